"""Evaluation on held-out samples, with the loss of every depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, Derived, Resume, knob


@dataclass(kw_only=True, slots=True)
class ValidationConfig(Section):
    """Evaluation on held-out samples, with the loss of every depth."""

    SECTION: ClassVar[str] = "validation"
    RESUME: ClassVar[Resume] = "free"

    eval_interval: int | None = knob(None, ge=1, le=MAX_STEPS, phase="free")
    """Steps between evaluations; None: none during training."""
    eval_iters: int = knob(32, ge=-1, le=MAX_STEPS, phase="free")
    """Global batches of one evaluation; -1: each sample of each set once; 0: no evaluation."""
    eval_at_start: bool = False
    """Evaluate before the first step."""
    eval_at_end: bool = True
    """Evaluate after the last step."""
    eval_micro_batch_size: Derived[int] = knob(None, ge=1, le=1_000_000, phase="free")
    """Samples in one forward pass of one rank; None: train.micro_batch_size."""
    eval_global_batch_size: Derived[int] = knob(None, ge=1, le=1_000_000, phase="free")
    """Samples in one evaluation step over all ranks; None: train.global_batch_size."""
    draft_prompts: int = knob(0, ge=0, le=100_000)
    """At each evaluation, this many held-out samples are decoded from their first tokens on, with the MTP layers as
    drafters (metrics drafting/...); 0: none."""

    @property
    def reads_once(self) -> bool:
        """Whether an evaluation takes each sample of each set once, in place of a number of batches."""
        return self.eval_iters == -1
