"""Held-out loss and acceptance of every depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtp.data.loader import DataModule
from megatron_mtp.training.step import Engine


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Sums over all batches of one validation set.

    losses [1+D] are sums over counts, in nats per token: every valid target weighs the same.
    """

    losses: list[float]
    depth_counts: Tensor
    acceptance: Tensor


def evaluate(engine: Engine, data: DataModule, loss_factor: float) -> dict[str, EvaluationResult]:
    """Evaluates every validation set on its first batches, the same ones at each call.

    Args:
        loss_factor: lambda; it enters no figure, the model's forward pass needs an objective.

    Returns:
        Validation set name -> result, the main set first.
    """
    return {name: _evaluate_set(engine, data, name, loss_factor) for name in data.valid_names}


def _evaluate_set(engine: Engine, data: DataModule, name: str, loss_factor: float) -> EvaluationResult:
    sums = counts = acceptance = None
    stream = data.valid(name)
    try:
        for batch in stream:
            result = engine.evaluate(batch, loss_factor)
            if sums is None:
                sums, counts, acceptance = result.depth_sums, result.depth_counts, result.acceptance
            else:
                sums, counts = sums + result.depth_sums, counts + result.depth_counts
                acceptance = acceptance + result.acceptance
    finally:
        stream.close()
    losses = torch.where(counts > 0, sums / counts, torch.nan)
    return EvaluationResult(losses.tolist(), counts, acceptance)
