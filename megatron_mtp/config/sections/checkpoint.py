"""Saving and loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import Resume, knob


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Saving and loading."""

    SECTION: ClassVar[str] = "checkpoint"
    RESUME: ClassVar[Resume] = "free"

    save: str | None = None
    """Folder of this run's checkpoints; None: nothing is saved."""
    load: str | None = None
    """Folder to resume from; the newest whole checkpoint in it. An empty or absent folder is a fresh start when it equals `save`."""
    pretrained_checkpoint: str | None = None
    """Weights to start from where there is nothing to resume: run directory or checkpoint folder, such as `convert import` makes. Optimizer and counters start anew."""
    save_interval: int | None = knob(None, ge=1)
    """Steps between checkpoints; None: only at the end."""
    save_optim: bool = True
    """Save optimizer state."""
    load_optim: bool = True
    """Load optimizer state."""
    save_interval_mins: float | None = knob(None, gt=0)
    """Minutes between checkpoints, beside save_interval; None: none by the clock."""
    most_recent_k: int = knob(-1, ge=-1)
    """Keep this many; -1: all."""
    keep_every: int | None = knob(None, ge=1)
    """Checkpoints of iterations divisible by this are kept for ever, beside the most recent ones."""
    keep_best: int = knob(0, ge=0)
    """Save after an evaluation with the lowest loss so far, and keep this many with the lowest ones, beside the most recent ones."""
    async_save: bool = False
    """Write while training goes on."""
    exit_on_missing_checkpoint: bool = False
    """Stop if `load` holds no checkpoint."""
