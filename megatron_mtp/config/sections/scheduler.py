"""Learning rate and weight decay over time. Give lengths in iterations, or in samples, or in tokens, not mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, MAX_TOKENS, PhaseRule, Resume, knob


@dataclass(kw_only=True, slots=True)
class SchedulerConfig(Section):
    """Learning rate and weight decay over time. Give lengths in iterations, or in samples, or in tokens, not mixed."""

    SECTION: ClassVar[str] = "scheduler"
    RESUME: ClassVar[Resume] = "curve"
    PHASE: ClassVar[PhaseRule] = "schedule"

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = knob(None, ge=1, le=MAX_STEPS)
    """Steps of the decay, warmup included; None: the whole run."""
    lr_decay_samples: int | None = knob(None, ge=1, le=MAX_STEPS)
    """The same in samples."""
    lr_decay_tokens: int | str | None = knob(None, ge=1, le=MAX_TOKENS)
    """The same in tokens."""
    lr_warmup_iters: int = knob(0, ge=0, le=MAX_STEPS)
    """Steps of linear warmup."""
    lr_warmup_samples: int = knob(0, ge=0, le=MAX_STEPS)
    """The same in samples."""
    lr_warmup_tokens: int | str = knob(0, ge=0, le=MAX_TOKENS)
    """The same in tokens."""
    lr_warmup_fraction: float | None = knob(None, ge=0, lt=1)
    """Warmup as a share of the decay."""
    lr_warmup_init: float = knob(0.0, ge=0, le=1000)
    """Learning rate at step 0."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's last phase."""
    lr_wsd_decay_iters: int | None = knob(None, ge=1, le=MAX_STEPS)
    """Steps of WSD's last phase."""
    lr_wsd_decay_samples: int | None = knob(None, ge=1, le=MAX_STEPS)
    """The same in samples."""
    lr_wsd_decay_tokens: int | str | None = knob(None, ge=1, le=MAX_TOKENS)
    """The same in tokens."""
    start_weight_decay: float | None = knob(None, ge=0, le=1000)
    """None: optimizer.weight_decay."""
    end_weight_decay: float | None = knob(None, ge=0, le=1000)
    """None: optimizer.weight_decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end."""
