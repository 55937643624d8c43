"""Which samples form each global batch: positions in one endless sequence, divided by the batch-size schedule.

Nothing here depends on the data-parallel size, the micro-batch size or the length of the run, so none of them can
change the order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.data.randomness import derive_key, permute


def batch_positions(
    schedule: BatchSchedule, consumed_samples: int = 0, since_ramp: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (step, positions int64 [global batch]) endlessly, from `consumed_samples` on.

    Args:
        since_ramp: samples since the batch schedule began; None: it began with the order of the data.
    """
    position, clock = consumed_samples, consumed_samples if since_ramp is None else since_ramp
    step = schedule.step_at(clock)
    while True:
        size = schedule.size_at(clock)
        yield step, np.arange(position, position + size)
        step, position, clock = step + 1, position + size, clock + size


def local_positions(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Indices in the global batch of one data-parallel rank's samples, int64 [micro-batches, micro_batch_size].

    Megatron's rule: sample j of micro-batch m on rank r has index (m * dp_size + r) * micro_batch_size + j.
    Global batch 8, micro-batch 2, rank 1 of 2: [[2 3] [6 7]].
    """
    assert global_batch_size % (micro_batch_size * dp_size) == 0, "finalize(world_size) refuses such batches"
    places = np.arange(global_batch_size).reshape(-1, dp_size, micro_batch_size)
    return places[:, dp_rank]


def epoch_samples(ordinals: np.ndarray, size: int, seed: int, name: str) -> np.ndarray:
    """Maps draws from a data set to its samples: epoch n // size is a permutation that (seed, name, epoch) determines.

    Args:
        ordinals: int64 [n], draws counted from 0 over all epochs.
        size: samples in one epoch.
        name: of the data set, so that data sets of equal size have different permutations.
    """
    ordinals = np.asarray(ordinals, np.int64)
    out = np.empty_like(ordinals)
    for epoch in np.unique(ordinals // size):
        inside = ordinals // size == epoch
        out[inside] = permute(ordinals[inside] % size, size, derive_key(seed, name, "epoch", int(epoch)))
    return out
