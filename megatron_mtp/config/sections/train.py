"""Batch sizes, the end of training, and what to do about bad numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Batch sizes, the end of training, and what to do about bad numbers."""

    SECTION: ClassVar[str] = "train"

    micro_batch_size: int = 1
    """Samples in one forward pass of one rank."""
    global_batch_size: int = 1
    """Samples in one optimizer step over all ranks."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: grows the global batch from start to global_batch_size over that many samples."""
    train_iters: int | None = None
    """Ends after this many steps."""
    train_samples: int | None = None
    """Ends after this many samples."""
    train_tokens: int | str | None = None
    """Ends after this many tokens; "10B" is accepted."""
    exit_interval: int | None = None
    """Saves and leaves after a step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Saves and leaves after this much wall-clock time."""
    manual_gc: bool = True
    """Python's garbage collector runs at the same steps on every rank."""
    manual_gc_interval: int = 100
    """Steps between collections."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on a GPU."""
    on_nan: Literal["skip", "stop", "rollback"] = "skip"
    """A loss or gradient that is not finite: leave the update out, stop, or go back to the last checkpoint and pass over the batches since."""
    on_spike: Literal["report", "skip", "stop", "rollback"] = "report"
    """A loss or gradient norm far above those before it: apply it and say so, or as on_nan."""
    spike_sigmas: float = 6.0
    """A spike is this many standard deviations above the mean of the last spike_window good steps."""
    spike_window: int = 128
    """Good steps that a spike is compared with; half of them must have been done."""
    skip_limit: int = 10
    """Steps left out in a row after which the run stops."""
    rollback_limit: int = 3
    """Rollbacks after which the run stops at the next fault."""
    check_replicas_interval: int | None = None
    """Steps between comparisons of the weights of data-parallel replicas, by hash; None: never."""
