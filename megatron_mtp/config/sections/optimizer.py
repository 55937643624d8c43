"""The update rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(Section):
    """The update rule."""

    SECTION: ClassVar[str] = "optimizer"

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """adam is AdamW (decoupled weight decay)."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Applied to matrices; not to biases and norms."""
    apply_wd_to_qk_layernorm: bool = False
    """Weight decay on query and key norms too."""
    adam_beta1: float = 0.9
    """First moment."""
    adam_beta2: float = 0.95
    """Second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz steps of Muon."""
    muon_scale_mode: str = "spectral"
    """Scale of Muon's update."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0: no clipping."""
    log_num_zeros_in_grad: bool = False
    """Count zeros in the gradients."""
