from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mtp.mcore.patches import replaced
from megatron_mtp.training import optimizer
from tests.harness.models import small_config
from tests.harness.ranks import Ranks
from tests.harness.runs import opened

pytestmark = pytest.mark.dist


class WeightSized(TorchDispatchMode):
    """Notes the products and embedding gradients that have the shape of a weight."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.shapes, self.found = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        makes = str(func).startswith(("aten.mm.default", "aten.bmm", "aten.embedding_dense_backward", "aten.index_put"))
        if makes and isinstance(result, torch.Tensor) and result.shape in self.shapes:
            self.found.append((str(func), tuple(result.shape)))
        return result


def gradients_of_a_step(
    recipe: str, overrides: Sequence[str], size: int, in_place: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Gradients after two micro-batches, and what was made in the shape of a weight."""
    change = nullcontext() if in_place else replaced(optimizer, add_in_place=lambda chunks: None)
    with change, opened(small_config(recipe, overrides, size)) as run:
        named = [pair for chunk in run.engine.chunks for pair in chunk.module.named_parameters()]
        shapes = {p.shape for _, p in named if p.dim() == 2 and p.numel() > 1000}
        with WeightSized(shapes) as mode:
            run.engine.train(next(run.data.train(0)), 1.0)
        return {name: p.main_grad.clone() for name, p in named}, mode.found


SHAPES = ("model.seq_length=48", "train.micro_batch_size=1")
"""No activation has the shape of a weight."""

CASES = {
    "dense": ("tiny_dense", (), 1),
    "tied": ("tiny_dense", ("model.share_embeddings_and_output_weights=true",), 1),
    "repeated layer": ("tiny_dense", ("model.mtp_use_repeated_layer=true", "model.mtp_num_layers=2"), 1),
    "recomputed": (
        "tiny_dense",
        ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"),
        1,
    ),
    "experts and latents": ("tiny_mla_moe", (), 1),
    "tensor and sequence parallel": (
        "tiny_dense",
        ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        2,
    ),
    "two stages": ("tiny_dense", ("model.pipeline_model_parallel_size=2",), 2),
    "overlapped": ("tiny_dense", ("ddp.overlap_grad_reduce=true",), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(ranks: Ranks, case: str):
    recipe, overrides, size = CASES[case]
    ours = ranks(size).run(gradients_of_a_step, recipe, overrides, size, True)
    plain = ranks(size).run(gradients_of_a_step, recipe, overrides, size, False)
    for (mine, _), (theirs, _) in zip(ours, plain, strict=True):
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert expected.abs().max() > 0 or "expert" in name, f"{name} has no gradient to compare"
            difference = (mine[name] - expected).abs().max()
            assert difference <= 2e-6 * expected.abs().max() + 1e-12, name


def test_nothing_as_large_as_the_weights_is_made_beside_the_buffer(ranks: Ranks):
    [(_, made)] = ranks(1).run(gradients_of_a_step, "tiny_dense", SHAPES, 1, True)
    [(_, otherwise)] = ranks(1).run(gradients_of_a_step, "tiny_dense", SHAPES, 1, False)
    assert made == []
    assert len(otherwise) > 8
