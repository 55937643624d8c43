"""MTP's share of the gradient at the trunk's output, against autograd and at every layout; loads of experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.models import small_config
from tests.harness.ranks import Ranks
from tests.harness.runs import opened

pytestmark = pytest.mark.dist

NAMES = ("lm/trunk_gradient", "mtp/trunk_gradient", "mtp/gradient_share")


def measured(recipe: str, overrides: tuple[str, ...], factor: float = 0.3) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a measured step, and of the step after it, which is not measured."""
    from megatron_mtp.training.measurements import Measurements

    cfg = small_config(recipe, ("logger.health_interval=2", *overrides), dist.get_world_size())
    with opened(cfg) as run:
        measurements = Measurements(run.resolved, run.engine.chunks, run.groups, run.engine.device)
        batch, found = next(run.data.train(0)), []
        for iteration in (2, 3):
            measurements.begin(iteration)
            run.engine.evaluate(batch, factor)  # not counted
            run.engine.forward_backward(batch, factor)
            found.append(measurements.read(float(run.engine.optimizer.get_loss_scale())))
    return found[0], found[1]


def by_autograd(recipe: str, overrides: tuple[str, ...], factor: float) -> dict[str, float]:
    """The same on one rank: the trunk's output is made a leaf, and each part is a gradient of its own."""
    from megatron_mtp.model.sharded import unwrap
    from megatron_mtp.objective.objective import total_coefficients

    cfg = small_config(recipe, overrides, 1)
    squares = [0.0, 0.0]
    with opened(cfg) as run:
        model, batch = unwrap(run.engine.chunks[0]), next(run.data.train(0))
        counts = batch.num_targets
        coefficients = total_coefficients(counts, factor, run.resolved.depths.weights)
        parts = [coefficients.clone(), coefficients.clone()]
        parts[0][1:], parts[1][0] = 0.0, 0.0
        states: list[torch.Tensor] = []
        is_pre = cfg.model.mtp_hidden_source == "pre_final_norm"
        norm = model.decoder.final_layernorm
        if is_pre:
            hook = norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        else:
            hook = norm.register_forward_hook(lambda *given: states.append(given[2]))
        for micro_batch in batch.micro_batches:

            def total(hidden: Any, weight: Any, context: Any) -> Any:
                labels, mask = context.labels, context.loss_mask  # [1+D, b, s]
                logits = (hidden.transpose(1, 2) @ weight.t())[..., : cfg.model.vocab_size].double()
                losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
                return (losses.view(labels.shape) * mask).sum(dim=(1, 2))

            sums = model(
                input_ids=micro_batch.tokens,
                position_ids=micro_batch.position_ids,
                attention_mask=micro_batch.segment_ids,
                output_processor=total,
                output_processor_context=micro_batch,
            )
            states[-1].retain_grad()
            for part, weights in enumerate(parts):
                states[-1].grad = None
                (sums * weights).sum().backward(retain_graph=True)
                assert states[-1].grad is not None
                squares[part] += float(states[-1].grad.double().square().sum())
        hook.remove()
    main, mtp = map(math.sqrt, squares)
    return dict(zip(NAMES, (main, mtp, mtp / (main + mtp)), strict=True))


CASES = {
    "dense": ("tiny_dense", ()),
    "tied": ("tiny_llama", ("model.mtp_num_layers=1",)),
    "before the final norm": ("tiny_mimo", ()),
    "parallel": ("tiny_dense", ("model.mtp_variant=parallel",)),
    "repeated": ("tiny_dense", ("model.mtp_use_repeated_layer=True",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_is_that_of_autograd(ranks: Ranks, case: str):
    recipe, overrides = CASES[case]
    ((found, later),) = ranks(1).run(measured, recipe, overrides, 0.3)
    ((expected),) = ranks(1).run(by_autograd, recipe, overrides, 0.3)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0.01 < found["mtp/gradient_share"] < 0.9
    assert later == {}


def test_detached_heads_have_no_share(ranks: Ranks):
    ((found, _),) = ranks(1).run(measured, "tiny_dense", ("model.mtp_detach_heads=True",), 0.3)
    assert found["mtp/gradient_share"] == 0.0
    assert found["lm/trunk_gradient"] > 0


def test_a_frozen_trunk_has_no_gradient_to_share(ranks: Ranks):
    ((found, _),) = ranks(1).run(measured, "tiny_dense", ("model.mtp_freeze_trunk=True",), 0.3)
    assert found == {}


def changes(overrides: tuple[str, ...]) -> list[dict[str, float]]:
    """Metrics of the weights at three measurements: the first; after the first MTP layer is 1 % larger; unchanged."""
    from megatron_mtp.model.sharded import unwrap
    from megatron_mtp.training.measurements import Measurements

    cfg = small_config("tiny_dense", ("logger.health_interval=1", *overrides), dist.get_world_size())
    with opened(cfg) as run:
        measurements = Measurements(run.resolved, run.engine.chunks, run.groups, run.engine.device)
        found = []
        for iteration in range(3):
            for chunk in run.engine.chunks if iteration == 1 else []:
                for name, weight in unwrap(chunk).named_parameters():
                    if name.startswith("mtp.layers.0."):
                        weight.data.mul_(1.01)
            measurements.begin(iteration)
            run.engine.forward_backward(next(run.data.train(0)), 0.3)
            metrics = measurements.read(1.0)
            found.append({name: value for name, value in metrics.items() if name.endswith("weight_change")})
    return found


@pytest.mark.parametrize(
    ("size", "overrides", "depths"),
    [
        (1, (), 2),
        (1, ("model.mtp_use_repeated_layer=True",), 1),
        (2, ("model.pipeline_model_parallel_size=2",), 2),
        (2, ("model.tensor_model_parallel_size=2",), 2),
    ],
    ids=["one", "repeated", "pp=2", "tp=2"],
)
def test_a_change_of_an_mtp_layers_weights_is_seen_on_every_rank(
    ranks: Ranks, size: int, overrides: tuple[str, ...], depths: int
):
    for first, second, third in ranks(size).run(changes, overrides):
        assert first == {}
        assert second["mtp_1/weight_change"] == pytest.approx(0.01)
        others = [second[f"mtp_{k}/weight_change"] for k in range(2, depths + 1)]
        assert [*others, *third.values()] == [0.0] * (depths - 1 + depths)


LAYOUTS = {
    "tp=2": ("model.tensor_model_parallel_size=2",),
    "tp=2, sequence parallel": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=True"),
    "cp=2": ("model.context_parallel_size=2",),
    "dp=2": (),
    "pp=2": ("model.pipeline_model_parallel_size=2",),
}
STANDALONE = ("model.pipeline_model_parallel_size=4", "model.pipeline_model_parallel_layout=Ett|tt|mm|L")
"""A stage with the MTP layers alone, between the last decoder layer and the heads."""


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        *(pytest.param(2, overrides, id=name) for name, overrides in LAYOUTS.items()),
        pytest.param(4, STANDALONE, id="standalone MTP stage", marks=pytest.mark.slow),
    ],
)
def test_the_share_is_the_same_at_every_layout(ranks: Ranks, size: int, overrides: tuple[str, ...]):
    ((expected, _),) = ranks(1).run(measured, "tiny_dense", (), 0.3)
    for found, later in ranks(size).run(measured, "tiny_dense", overrides, 0.3):
        assert found == pytest.approx(expected, rel=1e-4)
        assert later == {}


MOE_LAYOUTS = {
    "ep=2": ("model.expert_model_parallel_size=2",),
    "pp=2": ("model.pipeline_model_parallel_size=2",),
    "tp=2": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=True"),
    "recomputed": (
        "model.recompute_granularity=full",
        "model.recompute_method=uniform",
        "model.recompute_num_layers=1",
    ),
}


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_loads_are_the_same_at_every_layout(ranks: Ranks, layout: str):
    ((expected, _),) = ranks(1).run(measured, "tiny_mla_moe", (), 0.3)
    layers = [f"moe/max_load_layer_{idx}" for idx in (1, 2, 3)]  # the first one is dense
    layers += ["moe/max_load_mtp_layer_0", "moe/max_load_mtp_layer_1"]
    assert expected.keys() == {*NAMES, *layers, "moe/max_load", "moe/min_load", "moe/largest_share"}
    assert expected["moe/max_load"] == max(expected[name] for name in layers)
    assert expected["moe/largest_share"] == pytest.approx(expected["moe/max_load"] / 8)
    size = 1 if layout == "recomputed" else 2
    for found, later in ranks(size).run(measured, "tiny_mla_moe", MOE_LAYOUTS[layout], 0.3):
        assert found == pytest.approx(expected, rel=1e-3)
        assert later == {}


def test_loads_of_counts():
    from megatron_mtp.training.measurements import expert_loads

    assert expert_loads({"layer_0": [6, 2, 4, 4], "layer_2": [4, 4, 4, 4], "mtp_layer_0": [0, 0, 0, 0]}) == {
        "moe/max_load_layer_0": 1.5,
        "moe/max_load_layer_2": 1.0,
        "moe/max_load": 1.5,
        "moe/min_load": 0.5,
        "moe/largest_share": 0.375,
    }
