"""Batches as the model receives them: the micro-batches of one rank in one global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megatron_mtp.data.shift import base_loss_mask, depth_targets, positions, segments
from megatron_mtp.data.source import Sample
from megatron_mtp.data.zigzag import zigzag_slice


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward pass. Sequences are zigzag-sharded over cp, except the segment ids.

    Attributes:
        tokens: int64 [b, s/cp].
        position_ids: int64 [b, s/cp].
        shifted_ids: int64 [D, b, s/cp], the ids that depths 1..D read.
        labels: int64 [1+D, b, s/cp], the ids that depths 0..D predict.
        loss_mask: float32 [1+D, b, s/cp].
        segment_ids: int32 [b, s], the document of each token on the FULL sequence; None: attention may cross documents.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    shifted_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    segment_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MicroBatch:
        """A copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """A copy in page-locked memory, from which a copy to a GPU overlaps with compute."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


NO_SAMPLE = -1
"""Stands for the id of a sample in places of a batch that only fill it."""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One rank's part of one optimizer step.

    Attributes:
        step: number of steps before this one; in evaluation, the index of the batch.
        sample_ids: int64 [global batch], ids of ALL samples of the step, in order; NO_SAMPLE in places that only fill
            the batch, where no target counts.
        places: int64 [micro-batches, b], the indices in `sample_ids` of the samples that this rank holds.
        micro_batches: this rank's micro-batches.
        num_targets: int64 [1+D], valid targets of each depth in this rank's micro-batches and sequence slice. Summed
            over data-parallel and context-parallel ranks it is N_k of the objective.
    """

    step: int
    sample_ids: np.ndarray
    places: np.ndarray
    micro_batches: list[MicroBatch]
    num_targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How samples become tensors.

    Attributes:
        num_depths: D.
        mask_document_starts: the first token of a document is no target.
        separate_documents: attention and targets stay inside a document.
        reset_position_ids: positions start at 0 in each document.
        cp_rank, cp_size: the slice of the sequence.
    """

    num_depths: int
    mask_document_starts: bool = False
    separate_documents: bool = False
    reset_position_ids: bool = False
    cp_rank: int = 0
    cp_size: int = 1


def make_micro_batch(samples: Sequence[Sample], rules: BatchRules) -> MicroBatch:
    """Stacks samples, makes the inputs and targets of every depth on full sequences, then slices them for cp.

    Args:
        samples: b samples of s+1 tokens.
    """
    tokens = np.stack([sample.tokens for sample in samples])  # [b, s+1]
    starts = np.stack([sample.starts for sample in samples])
    documents = segments(starts) if rules.separate_documents else None
    mask = base_loss_mask(starts, rules.mask_document_starts)
    for row, sample in zip(mask, samples, strict=True):
        if sample.is_target is not None:
            row *= sample.is_target[1:]
    targets = depth_targets(tokens, rules.num_depths, mask, documents)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(zigzag_slice(array, rules.cp_rank, rules.cp_size)))

    return MicroBatch(
        tokens=tensor(tokens[:, :-1]),
        position_ids=tensor(positions(starts[:, :-1], rules.reset_position_ids)),
        shifted_ids=tensor(targets.shifted_ids),
        labels=tensor(targets.labels),
        loss_mask=tensor(targets.loss_mask),
        segment_ids=None if documents is None else torch.from_numpy(np.ascontiguousarray(documents[:, :-1])),
    )


def count_targets(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Valid targets of each depth over micro-batches, int64 [1+D]."""
    return torch.stack([(batch.loss_mask != 0).sum(dim=(1, 2)) for batch in micro_batches]).sum(dim=0)
