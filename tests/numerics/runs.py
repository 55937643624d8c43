"""Short runs of the program at a layout, inside a pool of gloo workers, and what is compared between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.recipes import get_recipe

if TYPE_CHECKING:
    from megatron_mtp.training.setup import Run  # imports megatron, which takes seconds

SMALL = (
    "model.hidden_size=32",
    "model.seq_length=32",
    "model.vocab_size=96",
    "model.make_vocab_size_divisible_by=8",  # the padding depends on TP
    "model.logits_chunk_tokens=7",
)
"""Overrides that make a tiny recipe smaller still."""


@dataclass
class Curve:
    """Whole tensors have the names of the sharded state dict."""

    losses: list[list[float]]
    grad_norms: list[float | None]
    counts: list[int]
    first_gradients: dict[str, Tensor]
    weights_before: dict[str, Tensor]
    weights_after: dict[str, Tensor]
    spread: float
    """Largest difference between two ranks' copies of one weight after the steps."""


def small_config(recipe: str, overrides: tuple[str, ...], world_size: int) -> ConfigContainer:
    """A finalized config on the CPU."""
    cfg = get_recipe(recipe)
    apply_overrides(cfg, ["dist.device=cpu", "dist.num_threads=1", *overrides])
    return cfg.finalize(world_size)


@contextmanager
def opened(cfg: ConfigContainer) -> Iterator[Run]:
    """A run in a process that has joined the pool's group already."""
    from megatron_mtp.device.process_group import job_size
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import setup

    run = setup(resolve(cfg, job_size()))
    try:
        yield run
    finally:
        run.release()


def curve(recipe: str, overrides: tuple[str, ...], steps: int) -> Curve | None:
    """Trains for some steps; the figures on rank 0, None elsewhere."""
    import torch.distributed as dist

    from megatron_mtp.model.sharded import gather_parts, gradient_parts, parameter_parts, whole_tensors

    cfg = small_config(recipe, overrides, dist.get_world_size())
    with opened(cfg) as run:
        engine, batches = run.engine, run.data.train(0)
        before = gather_parts(parameter_parts(engine.chunks))
        results, gradients = [], None
        for step in range(steps):
            batch = next(batches)
            if step == 0:
                engine.forward_backward(batch, 1.0)
                gradients = gather_parts(gradient_parts(engine.chunks))
            results.append(engine.train(batch, 1.0))
        after = gather_parts(parameter_parts(engine.chunks))
        batches.close()
    if before is None or gradients is None or after is None:
        return None
    weights_after, spread = whole_tensors(after)
    return Curve(
        losses=[result.losses for result in results],
        grad_norms=[result.grad_norm for result in results],
        counts=results[0].depth_counts.tolist(),
        first_gradients=whole_tensors(gradients)[0],
        weights_before=whole_tensors(before)[0],
        weights_after=weights_after,
        spread=max(spread.values()),
    )


def relative_errors(got: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """|g - r| / max(|r|, 1e-3 * global norm / sqrt(number of tensors)) for each tensor, 2-norms."""
    assert got.keys() == reference.keys()
    global_norm = sum(float(r.double().norm()) ** 2 for r in reference.values()) ** 0.5
    floor = 1e-3 * global_norm / len(reference) ** 0.5
    return {
        name: float((got[name].double() - r.double()).norm()) / max(float(r.double().norm()), floor, 1e-30)
        for name, r in reference.items()
    }


@dataclass
class Step:
    """One forward and backward pass over hand-made samples."""

    losses: list[float]
    counts: list[int]
    acceptance: list[list[int]]
    router: dict[str, float]
    gradients: dict[str, Tensor]


def masked_step(recipe: str, overrides: tuple[str, ...], masks: Tensor, starts: Tensor | None = None) -> Step | None:
    """A step on random tokens with these masks. On rank 0, None elsewhere.

    Args:
        masks: [B, s], validity of the target t[i+1] of each sample of the global batch.
        starts: bool [B, s+1], where documents begin; None: nowhere.
    """
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_mtp.model.sharded import gather_parts, gradient_parts, whole_tensors
    from megatron_mtp.verify.batches import ArraySource

    cfg = small_config(recipe, overrides, dist.get_world_size())
    shape = (len(masks), masks.shape[1] + 1)
    tokens = torch.randint(0, cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(13))
    source = ArraySource(tokens.numpy(), masks.numpy(), np.zeros(shape, bool) if starts is None else starts.numpy())
    with opened(cfg) as run:
        batch = run.data.builder(source, cfg.train.micro_batch_size).build(0, np.arange(len(masks)))
        result = run.engine.forward_backward(batch, 1.0)
        gradients = gather_parts(gradient_parts(run.engine.chunks))
    if gradients is None:
        return None
    return Step(
        losses=result.losses,
        counts=result.depth_counts.tolist(),
        acceptance=result.acceptance.tolist(),
        router=result.router,
        gradients=whole_tensors(gradients)[0],
    )


def assert_same_step(got: Step, reference: Step, gradient_tolerance: float = 5e-6) -> None:
    """Counts exact, losses and router figures to 2e-6, each gradient to `gradient_tolerance` (see `relative_errors`)."""
    assert got.counts == reference.counts
    assert got.acceptance == reference.acceptance
    assert got.losses == pytest.approx(reference.losses, rel=2e-6, nan_ok=True)
    assert got.router == pytest.approx(reference.router, rel=2e-6)
    errors = relative_errors(got.gradients, reference.gradients)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= gradient_tolerance, worst
