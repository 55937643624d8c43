"""Dtype of the weights and activations in the forward and backward pass. Master weights are fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class PrecisionConfig(Section):
    """Dtype of the weights and activations in the forward and backward pass. Master weights are fp32."""

    SECTION: ClassVar[str] = "precision"

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp16 scales the loss."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    loss_scale: float | None = None
    """Constant loss scale for fp16; None: dynamic."""
    initial_loss_scale: float = 2.0**16
    """Where the dynamic loss scale starts."""
    min_loss_scale: float = 1.0
    """The dynamic loss scale stops halving here; training ends if steps go on overflowing."""
    loss_scale_window: int = 1000
    """Good steps before the scale doubles."""
    hysteresis: int = 2
    """Overflows before the scale halves."""
