"""Gradient norms of chosen parameters: the same at every layout, and those of the whole gradient put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.errors import ConfigError
from tests.harness.models import small_config
from tests.harness.ranks import Ranks
from tests.harness.runs import gradients_of, opened

pytestmark = pytest.mark.dist

PATTERNS = {
    "all": "*",
    "mtp": "mtp.*",
    "embedding": "embedding.*",
    "layer": "decoder.layers.1.*",
    "norms": "*norm*",
    "expert": "*.experts.3.*",
}


def norms_of_a_step(recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What each rank reads after a step whose gradient was clipped, and on rank 0 the norms of the whole tensors."""
    from megatron_mtp.training.callbacks import GradientNorms

    cfg = small_config(recipe, (*overrides, "optimizer.clip_grad=0.1"), dist.get_world_size())
    has_experts = bool(cfg.model.num_moe_experts)
    with opened(cfg) as run:
        chosen = {label: p for label, p in PATTERNS.items() if has_experts or label != "expert"}
        norms = GradientNorms(run, chosen)
        assert norms.read() == dict.fromkeys(chosen)
        batch = next(run.data.train(0))
        run.engine.forward_backward(batch, 1.0)
        before = norms.read()
        whole = gradients_of(run)  # complete tensors, by "key@layer,expert"
        result = run.engine.train(batch, 1.0)
        found = norms.read()
    assert result.grad_norm > 0.1, "nothing was clipped"
    expected = {"all": _norm(whole.values())}
    expected["mtp"] = _norm(value for name, value in whole.items() if name.startswith("mtp."))
    expected["embedding"] = _norm(value for name, value in whole.items() if name.startswith("embedding."))
    same = {name: before[name] for name in expected}
    return {"found": found, "grad_norm": result.grad_norm, "whole": (expected, same), "names": norms.names}


def _norm(tensors: Any) -> float:
    return float(torch.stack([value.double().norm() for value in tensors] or [torch.zeros(())]).norm())


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks):
    """The values of one rank, by recipe and settings of the model; each is computed once."""
    seen: dict[Any, dict[str, Any]] = {}

    def compute(recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
        if (recipe, overrides) not in seen:
            (seen[recipe, overrides],) = ranks(1).run(norms_of_a_step, recipe, overrides)
        return seen[recipe, overrides]

    return compute


TIED = ("model.share_embeddings_and_output_weights=true",)
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
LAYOUTS = [
    pytest.param("tiny_dense", (), (), id="dp2"),
    pytest.param("tiny_dense", (), ("ddp.use_distributed_optimizer=false",), id="dp2 not sharded"),
    pytest.param("tiny_dense", (), ("ddp.overlap_grad_reduce=true", "ddp.bucket_size=9000"), id="dp2 overlapped"),
    pytest.param("tiny_dense", (), TP2, id="tp2"),
    pytest.param("tiny_dense", (), PP2, id="pp2"),
    pytest.param("tiny_dense", TIED, PP2, id="pp2 tied"),
    pytest.param("tiny_dense", (), (*PP2, "model.virtual_pipeline_model_parallel_size=2"), id="vp2"),
    pytest.param("tiny_dense", (), ("model.context_parallel_size=2",), id="cp2"),
    pytest.param("tiny_moe", (), ("model.expert_model_parallel_size=2",), id="ep2"),
    pytest.param("tiny_moe", (), TP2, id="moe tp2"),
    pytest.param("tiny_mla_moe", (), PP2, id="mla moe pp2"),
    pytest.param("tiny_qwen3_next", (), TP2, id="gated delta net tp2"),
]


@pytest.mark.parametrize(
    ("recipe", "model", "layout"),
    [*LAYOUTS[:2], *(pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in LAYOUTS[2:])],
)
def test_norms_at_a_layout(ranks: Ranks, one_rank: Any, recipe: str, model: tuple[str, ...], layout: tuple[str, ...]):
    reference = one_rank(recipe, model)
    first, second = ranks(2).run(norms_of_a_step, recipe, (*model, *layout))
    assert first["found"] == second["found"], "every rank gets the values"
    assert first["names"] == reference["names"]
    assert first["found"] == pytest.approx(reference["found"], rel=2e-5)
    assert first["found"]["all"] == pytest.approx(first["grad_norm"], rel=1e-5)
    expected, found = first["whole"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in first["found"].values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_and_its_loss_scale(ranks: Ranks, dtype: str):
    first, _ = ranks(2).run(norms_of_a_step, "tiny_dense", (f"precision.dtype={dtype}",))
    assert first["found"]["all"] == pytest.approx(first["grad_norm"], rel=1e-6)


def mistaken() -> str:
    from megatron_mtp.training.callbacks import GradientNorms

    with opened(small_config("tiny_dense", PP2, 2)) as run:
        try:
            GradientNorms(run, {"a/b": "decoder.layers.1.mlp.linear_fc1.weights"})
        except ConfigError as error:
            return str(error)
    return ""


def test_a_pattern_that_fits_nothing(ranks: Ranks):
    """On every rank, also on the one that has the layer next to it."""
    said = "GradientNorms: 'a/b': 'decoder.layers.1.mlp.linear_fc1.weights' fits no trainable parameter. Did you mean "
    said += "decoder.layers.1.mlp.linear_fc1.weight?"
    assert ranks(2).run(mistaken) == [said] * 2
