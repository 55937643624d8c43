"""Batch sizes, the length of training, and what to do about bad numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, MAX_TOKENS, YEAR_MINUTES, knob


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Batch sizes, the length of training, and what to do about bad numbers."""

    SECTION: ClassVar[str] = "train"

    micro_batch_size: int = knob(1, ge=1, le=1_000_000, resume="free", phase="free")
    """Samples in one forward pass of one rank."""
    global_batch_size: int = knob(1, ge=1, le=1_000_000, phase="batch")
    """Samples in one optimizer step over all ranks."""
    rampup_batch_size: list[int] | None = knob(None, ge=1, le=MAX_STEPS, phase="batch")
    """[start, increment, samples]: grows the global batch from start to global_batch_size over that many samples."""
    train_iters: int | None = knob(None, ge=1, le=MAX_STEPS, resume="curve")
    """Ends after this many steps."""
    train_samples: int | None = knob(None, ge=1, le=MAX_STEPS, resume="curve")
    """Ends after this many samples."""
    train_tokens: int | str | None = knob(None, ge=1, le=MAX_TOKENS, resume="curve")
    """Ends after this many tokens; "10B" is accepted."""
    exit_interval: int | None = knob(None, ge=1, le=MAX_STEPS, resume="free")
    """Saves a checkpoint and exits after a step divisible by this."""
    exit_duration_in_mins: float | None = knob(None, gt=0, le=YEAR_MINUTES, resume="free")
    """Saves a checkpoint and exits after this many minutes of wall-clock time: 1410 for 23.5 hours."""
    manual_gc: bool = knob(True, resume="free")
    """Python's garbage collector runs at the same steps on every rank."""
    manual_gc_interval: int = knob(100, ge=1, le=MAX_STEPS, resume="free")
    """Steps between collections."""
    deterministic: bool = knob(False, resume="free")
    """Ask torch for deterministic kernels; slower on a GPU."""
    on_nan: Literal["skip", "stop", "rollback"] = knob("skip", resume="curve", phase="free")
    """A loss or gradient that is not finite: skip the update, stop, or go back to the last checkpoint and skip the
    batches since."""
    on_spike: Literal["report", "skip", "stop", "rollback"] = knob("report", resume="curve", phase="free")
    """A loss or gradient norm far above those before it: apply the update and log it (report), or as on_nan."""
    spike_sigmas: float = knob(6.0, gt=0, le=1e6, resume="curve", phase="free")
    """A spike is this many standard deviations above the mean of the last spike_window good steps."""
    spike_window: int = knob(128, ge=4, le=1_000_000, resume="curve", phase="free")
    """Good steps that a spike is compared with. Spikes are detected once half of them exist."""
    mtp_autotune: bool = knob(False, resume="curve")
    """Lower or raise the MTP loss factor when health signs ask for it, by a fixed rule (docs/monitoring.md)."""
    skip_limit: int = knob(10, ge=1, le=MAX_STEPS, resume="free", phase="free")
    """Steps skipped in a row after which the run stops."""
    rollback_limit: int = knob(3, ge=0, le=1_000_000, resume="free", phase="free")
    """Rollbacks after which the run stops at the next fault."""
    check_replicas_interval: int | None = knob(None, ge=1, le=MAX_STEPS, resume="free")
    """Steps between comparisons of the weights of data-parallel replicas, by hash; None: never."""
    callbacks: list[str] = knob([], resume="free")
    """Callbacks of your own: file.py:Class or module:Class, each made without arguments (docs/extending.md)."""
