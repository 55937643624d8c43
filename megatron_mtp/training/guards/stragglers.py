"""Names ranks that are slower than the others while training still goes on."""

from __future__ import annotations

import socket
import statistics
from typing import Any

import torch.distributed as dist

MARGIN_S = 0.02
"""Less is noise of tiny models."""
MIN_INTERVAL = 10
"""Steps that are averaged at least."""


class StragglerWatch:
    """Compares the time that each rank takes until its gradients are there, averaged over some steps.

    Afterwards ranks wait for each other, so the time of a whole step is the same on all. Pipeline stages wait for each other before that
    too: the news is which data-parallel replica is slow.

    Args:
        factor: a rank is named if it takes this many times the median; 0: never.
        interval: steps between comparisons.
    """

    def __init__(self, factor: float, interval: int):
        self._factor, self._interval = factor, max(interval, MIN_INTERVAL)
        self._times: list[float] = []

    def step(self, own_s: float) -> list[str]:
        """Takes in one step. Every `interval` steps a collective.

        Args:
            own_s: this rank's time until its gradients were there.

        Returns:
            One sentence for each straggler, on every rank.
        """
        if not self._factor or dist.get_world_size() == 1:
            return []
        self._times.append(own_s)
        if len(self._times) < self._interval:
            return []
        mean = statistics.fmean(self._times)
        self._times.clear()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mean, socket.gethostname()))
        return stragglers(everyone, self._factor)


def stragglers(everyone: list[tuple[float, str]], factor: float) -> list[str]:
    """One sentence for each rank above `factor` times the median.

    Args:
        everyone: (seconds, host) of each rank in order.
    """
    median = statistics.median_low([seconds for seconds, _ in everyone])
    return [
        f"rank {rank} on {host} is slow: {seconds * 1e3:.0f} ms until its gradients are there, {seconds / median:.1f} times the "
        "median. The whole job waits for it."
        for rank, (seconds, host) in enumerate(everyone)
        if seconds > max(factor * median, median + MARGIN_S)
    ]
