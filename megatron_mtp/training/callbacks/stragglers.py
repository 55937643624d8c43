"""Names ranks that are slower than the others during training."""

from __future__ import annotations

import logging
import socket
import statistics
from typing import Any

import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.training.callbacks.base import ConfiguredCallback
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult

logger = logging.getLogger(__name__)

MARGIN_S = 0.02
"""Smaller differences are noise, as in tiny models."""
MIN_INTERVAL = 10
"""Fewer steps are too noisy to compare."""


class StragglerReport(ConfiguredCallback):
    """Compares how long each rank takes to compute its own gradients, averaged over some steps.

    After that, ranks wait for each other in the reduction, so a complete step takes the same time on all. Pipeline
    stages wait for each other earlier, so with PP the report names the slow data-parallel replica, not the stage.

    Args:
        factor: a rank is named if it takes this many times the median.
        interval: steps between comparisons; at least MIN_INTERVAL.
    """

    def __init__(self, factor: float, interval: int):
        self._factor, self._interval = factor, max(interval, MIN_INTERVAL)
        self._times_s: list[float] = []

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> StragglerReport | None:
        """Asked for by dist.straggler_factor."""
        return cls(cfg.dist.straggler_factor, cfg.logger.log_interval) if cfg.dist.straggler_factor else None

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """Records one step; every interval steps a collective compares the ranks."""
        if dist.get_world_size() == 1:
            return
        self._times_s.append(run.engine.gradients.own_s)
        if len(self._times_s) < self._interval:
            return
        mean_s = statistics.fmean(self._times_s)
        self._times_s.clear()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mean_s, socket.gethostname()))
        for straggler in stragglers(everyone, self._factor):
            logger.warning("iteration %d: %s", state.iteration, straggler)


def stragglers(everyone: list[tuple[float, str]], factor: float) -> list[str]:
    """One sentence for each rank above `factor` times the median.

    Args:
        everyone: (seconds, host) of each rank in order.
    """
    median = statistics.median_low([seconds for seconds, _ in everyone])
    return [
        f"rank {rank} on {host} is slow: {seconds * 1e3:.0f} ms until its gradients are computed, "
        f"{seconds / median:.1f} times the median. All other ranks wait for it."
        for rank, (seconds, host) in enumerate(everyone)
        if seconds > max(factor * median, median + MARGIN_S)
    ]
