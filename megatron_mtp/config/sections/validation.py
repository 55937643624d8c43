"""Evaluation on held-out samples, the loss of every depth included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class ValidationConfig(Section):
    """Evaluation on held-out samples, the loss of every depth included."""

    SECTION: ClassVar[str] = "validation"

    eval_interval: int | None = None
    """Steps between evaluations; None: none during training."""
    eval_iters: int = 32
    """Global batches of one evaluation; 0: no evaluation."""
    eval_at_start: bool = False
    """Evaluate before the first step."""
    eval_at_end: bool = True
    """Evaluate after the last step."""
    eval_micro_batch_size: int | None = None
    """None: train.micro_batch_size."""
    eval_global_batch_size: int | None = None
    """None: train.global_batch_size."""
    draft_prompts: int = 0
    """At each evaluation, beginnings of this many held-out samples are decoded with the MTP layers as drafters (drafting/...); 0: none."""
