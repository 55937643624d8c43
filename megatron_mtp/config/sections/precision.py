"""Dtype of the weights and activations in the forward and backward pass. Master weights are fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, Resume, knob


@dataclass(kw_only=True, slots=True)
class PrecisionConfig(Section):
    """Dtype of the weights and activations in the forward and backward pass. Master weights are fp32."""

    SECTION: ClassVar[str] = "precision"
    RESUME: ClassVar[Resume] = "curve"

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp16 scales the loss."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    loss_scale: float | None = knob(None, gt=0, le=1e18)
    """Constant loss scale for fp16; None: dynamic."""
    initial_loss_scale: float = knob(2.0**16, gt=0, le=1e18)
    """Where the dynamic loss scale starts."""
    min_loss_scale: float = knob(1.0, gt=0, le=1e18)
    """The dynamic loss scale stops halving here; training ends if steps keep overflowing."""
    loss_scale_window: int = knob(1000, ge=1, le=MAX_STEPS)
    """Good steps before the scale doubles."""
    hysteresis: int = knob(2, ge=1, le=1_000_000)
    """Overflows before the scale halves."""
