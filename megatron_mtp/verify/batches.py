"""One rank's part of a global batch that is made from a seed."""

from __future__ import annotations

import numpy as np
import torch

from megatron_mtp.data.batch import GlobalBatch, MicroBatch, count_targets
from megatron_mtp.data.loader import DataPlacement
from megatron_mtp.data.order import local_positions
from megatron_mtp.data.shift import depth_targets, positions, segments
from megatron_mtp.data.zigzag import zigzag_slice
from megatron_mtp.verify.masks import BatchSpec, whole_batch


def rank_batch(
    spec: BatchSpec, step: int, micro_batch_size: int, placement: DataPlacement, *, reset_position_ids: bool = False
) -> GlobalBatch:
    """One rank's micro-batches of the global batch of `step`."""
    whole = whole_batch(spec, step)
    documents = None if whole.starts is None else segments(whole.starts)
    starts = np.zeros(whole.tokens.shape, bool) if whole.starts is None else whole.starts
    targets = depth_targets(whole.tokens, spec.num_depths, whole.base_mask, documents)
    slots = positions(starts[:, :-1], reset_position_ids)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(zigzag_slice(array, placement.cp_rank, placement.cp_size)))

    def micro_batch(row: np.ndarray) -> MicroBatch:
        return MicroBatch(
            tokens=tensor(whole.tokens[row, :-1]),
            position_ids=tensor(slots[row]),
            shifted_ids=tensor(targets.shifted_ids[:, row]),
            labels=tensor(targets.labels[:, row]),
            loss_mask=tensor(targets.loss_mask[:, row]),
            segment_ids=None if documents is None else torch.from_numpy(documents[row, :-1].copy()),
        )

    places = local_positions(spec.num_samples, micro_batch_size, placement.dp_rank, placement.dp_size)
    micro_batches = [micro_batch(row) for row in places]
    return GlobalBatch(step, np.arange(spec.num_samples), places, micro_batches, count_targets(micro_batches))
