"""Names ranks that are slower than the others during training."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.observe.signs import Sign
from megatron_mtp.observe.trends import Window
from megatron_mtp.training.callbacks.base import ConfiguredCallback
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult

MARGIN_S = 0.02
"""Smaller differences are noise, as in tiny models."""
INTERVAL = 10
"""Steps between comparisons: few enough to name a rank soon, many enough for a median."""


class StragglerReport(ConfiguredCallback):
    """The health sign of slow ranks: compares how long each rank takes to compute its own gradients.

    After that, ranks wait for each other in the reduction, so a complete step takes the same time on all. Pipeline
    stages wait for each other earlier, so with PP the report names the slow data-parallel replica, not the stage.

    Args:
        factor: a rank is named if its median over INTERVAL steps is this many times the median of all ranks.
    """

    def __init__(self, factor: float):
        self._factor = factor
        self._times_s: list[float] = []
        self._hosts: list[Any] = []
        self._slow: list[str] = []

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> StragglerReport | None:
        """Asked for by dist.straggler_factor."""
        return cls(cfg.dist.straggler_factor) if cfg.dist.straggler_factor else None

    def health_signs(self) -> dict[str, Sign]:
        """The sign `slow rank`."""

        def slow_rank(history: Sequence[Window], now: Window) -> str | None:
            return " ".join(self._slow) or None

        return {"slow rank": slow_rank}

    def on_train_start(self, run: Run, state: TrainState) -> None:
        """A collective: every rank says where it runs."""
        self._hosts = [None] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """Records one step; every INTERVAL steps a collective compares the ranks."""
        if dist.get_world_size() == 1:
            return
        self._times_s.append(run.engine.gradients.own_s)
        if state.iteration % INTERVAL:
            return
        own = torch.tensor([statistics.median(self._times_s)], dtype=torch.float64, device=run.device.torch_device)
        self._times_s.clear()
        everyone = own.new_empty(dist.get_world_size())
        dist.all_gather_into_tensor(everyone, own)
        self._slow = stragglers(list(zip(everyone.tolist(), self._hosts, strict=True)), self._factor)


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
