"""Runs of the program in a process that has joined a group, such as a rank of a pool, and what tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from tests.harness.models import small_config

if TYPE_CHECKING:  # these import megatron, which takes seconds
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mtp.data.batch import GlobalBatch
    from megatron_mtp.data.loader import DataModule
    from megatron_mtp.model.sharded import Part
    from megatron_mtp.parallel.resolve import ResolvedRun
    from megatron_mtp.training.setup import Run


@contextmanager
def opened(cfg: ConfigContainer) -> Iterator[Run]:
    """A run with model, optimizer and data; `cfg` is finalized for the size of the group."""
    from megatron_mtp.device.process_group import job_size
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import setup

    run = setup(resolve(cfg, job_size()))
    try:
        yield run
    finally:
        run.release()


def call_before_each_batch(data: DataModule, call: Callable[[GlobalBatch], None]) -> None:
    """Calls a function with every training batch before the run gets it."""
    original = data.train

    def train(*place: Any) -> Iterator[GlobalBatch]:
        for batch in (stream := original(*place)):
            call(batch)
            yield batch
        stream.close()

    data.train = train


@contextmanager
def joined(cfg: ConfigContainer) -> Iterator[tuple[ResolvedRun, ProcessGroupCollection]]:
    """The process groups of a run, without a model."""
    from megatron_mtp.device.process_group import job_size
    from megatron_mtp.mcore.groups import destroy_model_parallel
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import join_groups

    resolved = resolve(cfg, job_size())
    _, groups = join_groups(resolved)
    try:
        yield resolved, groups
    finally:
        destroy_model_parallel()


def gathered(parts: list[Part]) -> dict[str, Tensor]:
    """The tensors of all ranks put together on rank 0, under the names of the sharded state dict; empty elsewhere.

    Copies of one part must be equal bit for bit on all ranks.
    """
    from megatron_mtp.model.sharded import gather_parts, whole_tensors

    tensors, spread = whole_tensors(gather_parts(parts) or [])
    assert not any(spread.values()), f"copies differ between ranks: {spread}"
    return tensors


def weights_of(run: Run) -> dict[str, Tensor]:
    """The weights and buffers of the model, as `gathered` returns them."""
    from megatron_mtp.model.sharded import parameter_parts

    return gathered(parameter_parts(run.engine.chunks))


def gradients_of(run: Run) -> dict[str, Tensor]:
    """The reduced gradients on rank 0; copies may differ by rounding, of which the last rank's is taken."""
    from megatron_mtp.model.sharded import gather_parts, gradient_parts, whole_tensors

    return whole_tensors(gather_parts(gradient_parts(run.engine.chunks)) or [])[0]


@dataclass
class Curve:
    """Some optimizer steps. Tensors are on rank 0 only; `weights_before` and `weights_after` have equal copies."""

    losses: list[list[float]]
    grad_norms: list[float | None]
    counts: list[int]
    first_gradients: dict[str, Tensor]
    weights_before: dict[str, Tensor]
    weights_after: dict[str, Tensor]


def curve(recipe: str, overrides: tuple[str, ...], steps: int) -> Curve:
    """Trains for some steps."""
    import torch.distributed as dist

    with opened(small_config(recipe, overrides, dist.get_world_size())) as run:
        engine, batches = run.engine, run.data.train(0)
        before, results, gradients = weights_of(run), [], {}
        for step in range(steps):
            batch = next(batches)
            if step == 0:
                engine.forward_backward(batch, 1.0)
                gradients = gradients_of(run)
            results.append(engine.train(batch, 1.0))
        batches.close()
        return Curve(
            losses=[result.losses for result in results],
            grad_norms=[result.grad_norm for result in results],
            counts=results[0].depth_counts.tolist(),
            first_gradients=gradients,
            weights_before=before,
            weights_after=weights_of(run),
        )


@dataclass
class Step:
    """One forward and backward pass over hand-made samples; gradients on rank 0 only."""

    losses: list[float]
    counts: list[int]
    acceptance: list[list[int]]
    router: dict[str, float]
    gradients: dict[str, Tensor]


def masked_step(recipe: str, overrides: tuple[str, ...], masks: Tensor, starts: Tensor | None = None) -> Step:
    """A step on random tokens with these masks.

    Args:
        masks: [B, s], validity of the target t[i+1] of each sample of the global batch.
        starts: bool [B, s+1], where documents begin; None: nowhere.
    """
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_mtp.verify.batches import ArraySource

    cfg = small_config(recipe, overrides, dist.get_world_size())
    shape = (len(masks), masks.shape[1] + 1)
    tokens = torch.randint(0, cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(13))
    source = ArraySource(tokens.numpy(), masks.numpy(), np.zeros(shape, bool) if starts is None else starts.numpy())
    with opened(cfg) as run:
        batch = run.data.builder(source, cfg.train.micro_batch_size).build(0, np.arange(len(masks)))
        result = run.engine.forward_backward(batch, 1.0)
        return Step(
            losses=result.losses,
            counts=result.depth_counts.tolist(),
            acceptance=result.acceptance.tolist(),
            router=result.router,
            gradients=gradients_of(run),
        )


def assert_same_step(got: Step, reference: Step, gradient_tolerance: float = 5e-6) -> None:
    """Counts exact, losses and router losses to 2e-6, gradients to `gradient_tolerance` (`compare.relative_errors`)."""
    from megatron_mtp.verify.compare import relative_errors

    assert got.counts == reference.counts
    assert got.acceptance == reference.acceptance
    assert got.losses == pytest.approx(reference.losses, rel=2e-6, nan_ok=True)
    assert got.router == pytest.approx(reference.router, rel=2e-6)
    errors = relative_errors(got.gradients, reference.gradients)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= gradient_tolerance, worst
