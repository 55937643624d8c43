"""The update rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import knob


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(Section):
    """The update rule."""

    SECTION: ClassVar[str] = "optimizer"

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """adam is AdamW (decoupled weight decay)."""
    lr: float = knob(3e-4, gt=0, le=1000, resume="curve", phase="schedule")
    """Peak learning rate."""
    min_lr: float = knob(3e-5, ge=0, le=1000, resume="curve", phase="schedule")
    """Learning rate at the end of the decay."""
    weight_decay: float = knob(0.1, ge=0, le=1000, resume="curve", phase="schedule")
    """Applied to matrices; not to biases and norms."""
    apply_wd_to_qk_layernorm: bool = knob(False, resume="curve")
    """Weight decay on query and key norms too."""
    adam_beta1: float = knob(0.9, ge=0, lt=1, resume="curve", phase="free")
    """First moment."""
    adam_beta2: float = knob(0.95, ge=0, lt=1, resume="curve", phase="free")
    """Second moment."""
    adam_eps: float = knob(1e-8, gt=0, le=1, resume="curve", phase="free")
    """Epsilon of Adam."""
    sgd_momentum: float = knob(0.9, ge=0, lt=1, resume="curve", phase="free")
    """Momentum of SGD."""
    muon_momentum: float = knob(0.95, ge=0, lt=1, resume="curve", phase="free")
    """Momentum of Muon."""
    muon_num_ns_steps: int = knob(5, ge=1, le=100, resume="curve", phase="free")
    """Newton-Schulz steps of Muon."""
    muon_scale_mode: str = knob("spectral", resume="curve", phase="free")
    """Scale of Muon's update."""
    clip_grad: float = knob(1.0, ge=0, le=1e12, resume="curve", phase="free")
    """Global gradient norm is clipped to this; 0: no clipping."""
    log_num_zeros_in_grad: bool = knob(False, resume="free")
    """Count zeros in the gradients."""
