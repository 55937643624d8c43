"""Held-out loss and acceptance of every depth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from megatron_mtp.data.loader import DataModule
from megatron_mtp.objective.metrics import BatchMetrics
from megatron_mtp.training.guards.data_errors import agreed
from megatron_mtp.training.step import Engine

EvaluationResult = BatchMetrics
"""Metrics of all batches of one validation set together."""


def evaluate(
    engine: Engine, data: DataModule, loss_factor: float, names: Sequence[str] | None = None
) -> dict[str, EvaluationResult]:
    """Evaluates validation sets on their first batches, the same ones at each call.

    Args:
        loss_factor: lambda; it changes no metric, but the forward pass needs an objective.
        names: of the sets; None: all.

    Returns:
        Validation set name -> result, the main set first.

    Raises:
        LostDataError: on every rank: some rank can no longer read a set.
    """
    results = {}
    for name in data.valid_names if names is None else names:
        batches = agreed(data.valid(name), engine.device)
        results[name] = reduce(add, (engine.evaluate(batch, loss_factor) for batch in batches))
    return results
