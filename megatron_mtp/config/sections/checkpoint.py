"""Saving and loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, YEAR_MINUTES, Resume, knob


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Saving and loading."""

    SECTION: ClassVar[str] = "checkpoint"
    RESUME: ClassVar[Resume] = "free"

    save: str | None = knob(None, is_path=True, is_written=True, may_be_address=True)
    """Folder of this run's checkpoints, or an address of object storage, such as s3://bucket/run; None: nothing is
    saved."""
    load: str | None = knob(None, is_path=True, is_written=True, may_be_address=True)
    """Folder or address to resume from: its newest complete checkpoint. If it equals `save`, an empty or absent
    folder starts a new run."""
    enter_phase: str | None = None
    """Name of a phase of `phases` that begins where this start resumes, wherever its own start is, unless it has begun
    already; None: each phase begins at its start."""
    pretrained_checkpoint: str | None = knob(None, is_path=True, may_be_address=True)
    """Weights to start from if there is nothing to resume: a run directory or checkpoint folder, such as `convert
    import` writes. The optimizer and all counters start from zero."""
    save_interval: int | None = knob(None, ge=1, le=MAX_STEPS, phase="free")
    """Steps between checkpoints; None: only at the end."""
    save_optim: bool = True
    """Save optimizer state."""
    load_optim: bool = True
    """Load optimizer state."""
    save_interval_mins: float | None = knob(None, gt=0, le=YEAR_MINUTES, phase="free")
    """Minutes between checkpoints, 120 for 2 hours, in addition to save_interval; None: only by steps."""
    most_recent_k: int = knob(-1, ge=-1, le=1_000_000)
    """Number of checkpoints to keep; -1: all."""
    keep_every: int | None = knob(None, ge=1, le=MAX_STEPS)
    """Checkpoints of iterations divisible by this are never deleted, in addition to the most recent ones."""
    keep_best: int = knob(0, ge=0, le=1_000_000)
    """Save after each evaluation with the lowest loss so far (`best_metric`), and keep this many with the lowest
    losses, in addition to the most recent ones."""
    best_metric: str | None = None
    """The loss that `keep_best` and RUN@best follow, SET/LOSS: "docs/lm loss", "validation/mtp_1 loss"; None: the main
    loss of the first validation set."""
    async_save: bool = False
    """Write in the background while training continues."""
    lock_wait_s: float = knob(60.0, ge=0, le=86_400)
    """Seconds that a start waits while another run trains in `save`, before it is refused. The other run may be about
    to be told to end; once it was, the start waits for up to dist.preemption_grace_s."""
    exit_on_missing_checkpoint: bool = False
    """Stop with an error if `load` holds no checkpoint."""
    exit_on_changed_data: bool = True
    """Stop with an error if the files of the training data are others than those that the checkpoint in `load` was
    trained on; false: the run goes on with them, and the change is reported."""
