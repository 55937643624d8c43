"""Learning rate and weight decay over time. Give lengths in iterations, or in samples, or in tokens, not mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class SchedulerConfig(Section):
    """Learning rate and weight decay over time. Give lengths in iterations, or in samples, or in tokens, not mixed."""

    SECTION: ClassVar[str] = "scheduler"

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Steps of the decay, warmup included; None: the whole run."""
    lr_decay_samples: int | None = None
    """The same in samples."""
    lr_decay_tokens: int | str | None = None
    """The same in tokens."""
    lr_warmup_iters: int = 0
    """Steps of linear warmup."""
    lr_warmup_samples: int = 0
    """The same in samples."""
    lr_warmup_tokens: int | str = 0
    """The same in tokens."""
    lr_warmup_fraction: float | None = None
    """Warmup as a share of the decay."""
    lr_warmup_init: float = 0.0
    """Learning rate at step 0."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's last phase."""
    lr_wsd_decay_iters: int | None = None
    """Steps of WSD's last phase."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples."""
    lr_wsd_decay_tokens: int | str | None = None
    """The same in tokens."""
    start_weight_decay: float | None = None
    """None: optimizer.weight_decay."""
    end_weight_decay: float | None = None
    """None: optimizer.weight_decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end."""
