"""Which samples form each global batch: positions in one endless sequence, cut by the batch-size schedule.

Nothing here knows the data-parallel size, the micro-batch or the length of the run, so none of them can change the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_mtp.data.randomness import derive_key, permute
from megatron_mtp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Global batch size as a function of the samples consumed so far.

    With `rampup` = (start, increment, samples) the batch grows from start to `global_batch_size` in equal increments
    over that many samples, each held for samples / number of increments: Megatron's --rampup-batch-size.

    Raises:
        ConfigError: the ramp does not reach global_batch_size in whole increments.
    """

    global_batch_size: int
    rampup: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.rampup is None:
            return
        if len(self.rampup) != 3:
            raise ConfigError(
                f"train.rampup_batch_size = {list(self.rampup)}: give three numbers, [start, increment, samples]."
            )
        start, increment, samples = self.rampup
        growth = self.global_batch_size - start
        if start < 1 or increment < 1 or samples < 0 or growth < 0 or growth % increment:
            raise ConfigError(
                f"train.rampup_batch_size = {list(self.rampup)}: must be [start, increment, samples] with "
                f"train.global_batch_size = {self.global_batch_size} equal to start plus a whole number of increments."
            )

    @classmethod
    def from_train(cls, train) -> BatchSchedule:
        """The schedule of a TrainConfig."""
        return cls(train.global_batch_size, tuple(train.rampup_batch_size) if train.rampup_batch_size else None)

    def size_at(self, consumed_samples: int) -> int:
        """Samples in the global batch that starts after `consumed_samples`."""
        if self.rampup is None:
            return self.global_batch_size
        start, increment, samples = self.rampup
        increments = (self.global_batch_size - start) // increment
        if increments == 0 or consumed_samples > samples or samples == 0:
            return self.global_batch_size
        return start + increment * (consumed_samples * increments // samples)

    def sizes(self) -> list[int]:
        """Every batch size that occurs, in order; each must divide by micro-batch times data-parallel size."""
        if self.rampup is None:
            return [self.global_batch_size]
        start, increment, _ = self.rampup
        return list(range(start, self.global_batch_size + 1, increment))

    def step_at(self, consumed_samples: int) -> int:
        """Number of whole steps that lie before `consumed_samples`; walks the ramp, then divides."""
        step = position = 0
        ramp_end = self.rampup[2] if self.rampup else -1
        while position <= ramp_end and position < consumed_samples:
            position += self.size_at(position)
            step += 1
        return step + max(0, -(-(consumed_samples - position) // self.global_batch_size))

    def consumed_after(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps."""
        position = step = 0
        ramp_end = self.rampup[2] if self.rampup else -1
        while position <= ramp_end and step < steps:
            position += self.size_at(position)
            step += 1
        return position + (steps - step) * self.global_batch_size

    def batches(self, consumed_samples: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (step, positions int64 [global batch]) for ever, from `consumed_samples` on."""
        step, position = self.step_at(consumed_samples), consumed_samples
        while True:
            size = self.size_at(position)
            yield step, np.arange(position, position + size)
            step, position = step + 1, position + size


def local_positions(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Places in the global batch that one data-parallel rank computes, int64 [micro-batches, micro_batch_size].

    Megatron's rule: sample j of micro-batch m on rank r is place (m * dp_size + r) * micro_batch_size + j.
    Global batch 8, micro-batch 2, rank 1 of 2: [[2 3] [6 7]].
    """
    places = np.arange(global_batch_size).reshape(-1, dp_size, micro_batch_size)
    return places[:, dp_rank]


def epoch_samples(ordinals: np.ndarray, size: int, seed: int, name: str) -> np.ndarray:
    """Maps the n-th draw from a data set to one of its samples: epoch n // size is a permutation from (seed, name, epoch).

    Args:
        ordinals: int64 [n], draws counted from 0 over all epochs.
        size: samples in one epoch.
        name: of the data set, so that two of equal size are not drawn in step.
    """
    ordinals = np.asarray(ordinals, np.int64)
    out = np.empty_like(ordinals)
    for epoch in np.unique(ordinals // size):
        inside = ordinals // size == epoch
        out[inside] = permute(ordinals[inside] % size, size, derive_key(seed, name, "epoch", int(epoch)))
    return out
