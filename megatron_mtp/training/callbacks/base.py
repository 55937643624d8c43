"""The extension point of the training loop: a closed set of events.

The loop knows nothing about what its callbacks do. Every rank calls every callback at the same points and in the same
order, so a callback may use collectives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.observe.signs import Sign
from megatron_mtp.training.evaluation import EvaluationResult
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | None]
"""Name -> value; None: nothing is recorded. Names with a slash, `area/thing_unit`, group in TensorBoard and W&B."""


class Callback:
    """Base class of callbacks; override the events you need.

    `run.request_stop(reason)` ends the run after the present step, with a checkpoint and exit code 0. An exception ends
    it at once, with a traceback, exit code 1 and no checkpoint.

    Metrics that an event returns are recorded on the console, in TensorBoard, W&B and JSONL. Rank 0 writes them, so a
    value that other ranks know must be brought there first: see `mean_over_ranks` and `max_over_ranks`.
    """

    @property
    def name(self) -> str:
        """Key of this callback's state in the checkpoint; two callbacks of one class need different ones."""
        return type(self).__name__

    def on_train_start(self, run: Run, state: TrainState) -> None:
        """Called before the first step of this process, with model, state and callbacks restored, and again where a
        phase begins: `run` is then another one, and whatever was kept of the run before is of no more use."""

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> Metrics | None:
        """Called when a step is counted in `state`, before it is recorded or saved.

        Returns:
            Metrics of this step. The console shows their mean over logger.log_interval, the other sinks over
            logger.tensorboard_log_interval.
        """

    def on_evaluation(self, run: Run, state: TrainState, results: dict[str, EvaluationResult]) -> Metrics | None:
        """Called when all validation sets were evaluated, before that is recorded, and recorded even if this fails.

        Returns:
            Metrics that are recorded with those of the first set.
        """

    def on_save(self, run: Run, state: TrainState) -> None:
        """Called before a checkpoint is written; `state_dict` is asked for afterwards."""

    def on_train_end(self, run: Run, state: TrainState) -> None:
        """Called when the loop has ended in order; process groups and data still exist."""

    def health_signs(self) -> dict[str, Sign]:
        """Warning signs to look for in the metrics of the run, by name, in addition to the built-in ones.

        Asked for once, before training starts.
        """
        return {}

    def close(self) -> None:
        """Called last, after an exception too: give back what the callback holds. No collectives here."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON values; the same on every rank. Kept in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned when the checkpoint was written."""


class ConfiguredCallback(Callback):
    """A callback that a field of the config switches on."""

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> Callback | None:
        """The callback that `cfg` asks for; None: it asks for none.

        Raises:
            ConfigError: it asks for one that this run cannot have.
        """
        raise NotImplementedError


def restore(callbacks: list[Callback], state: TrainState) -> None:
    """Hands each callback its state in the checkpoint. State of callbacks that this run lacks is kept."""
    for callback in callbacks:
        if callback.name in state.callbacks:
            callback.load_state_dict(state.callbacks[callback.name])
    if unknown := sorted(set(state.callbacks) - {callback.name for callback in callbacks}):
        logger.warning(
            "the checkpoint has state of callbacks that are not in this run: %s. It is kept.", ", ".join(unknown)
        )


def mean_over_ranks(run: Run, value: float | None, weight: float = 1.0) -> float | None:
    """A collective over all ranks: the weighted mean in fp64 of the values of those that have one; None: nobody has.

    Example: the MTP stage passes its value and the other stages pass None; every rank, rank 0 too, gets the value.

    Args:
        weight: of this rank's value, such as the number of tokens that it is a mean over.
    """
    weight = 0.0 if value is None else weight
    total = torch.tensor([(value or 0.0) * weight, weight], dtype=torch.float64, device=run.device.torch_device)
    dist.all_reduce(total)
    return (total[0] / total[1]).item() if total[1] else None


def max_over_ranks(run: Run, value: float | None) -> float | None:
    """A collective over all ranks: the largest value in fp64 of those that have one; None: nobody has."""
    given = -math.inf if value is None else value
    largest = torch.tensor([given, value is not None], dtype=torch.float64, device=run.device.torch_device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest[0].item() if largest[1] else None
