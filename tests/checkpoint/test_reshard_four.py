"""On four ranks: saved at each layout and resumed at each other one, the next steps give bit-equal weights."""

from __future__ import annotations

import itertools

import pytest

from tests.checkpoint.rig import DENSE, MOE, differences, resumed, trained

EIGHT = {"model.num_layers": 8}
MODELS = {
    "dense": {**DENSE, **EIGHT},
    "moe": {**MOE, **EIGHT, "model.moe_layer_freq": [0, 0, 1, 1, 1, 1, 1, 1]},
}
TP2 = {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}
PP2, PP4 = ({"model.pipeline_model_parallel_size": size} for size in (2, 4))
LAYOUTS = {
    "dp4": {},
    "tp2+pp2": {**TP2, **PP2},
    "pp4+vp2": {**PP4, "model.virtual_pipeline_model_parallel_size": 2},
    "m|L": {**PP4, "model.pipeline_model_parallel_layout": "Etttt|tttt|mm|L"},
    "cp2+tp2": {**TP2, "model.context_parallel_size": 2},
    "ep2+pp2": {**PP2, "model.expert_model_parallel_size": 2, "model.expert_tensor_parallel_size": 1},
}
FAST = [("dense", "tp2+pp2", "m|L")]
SAVED_AT, STEPS = 2, 4


def layouts_of(model: str) -> list[str]:
    return [name for name in LAYOUTS if model == "moe" or "ep" not in name]


ALL = [(model, old, new) for model in MODELS for old, new in itertools.permutations(layouts_of(model), 2)]


@pytest.fixture(scope="module")
def saved(four, tmp_path_factory):
    """(model, layout) -> (weights of a run that was never stopped, a directory with its checkpoint), made once."""
    made = {}

    def get(model: str, layout: str):
        if (model, layout) not in made:
            directory = str(tmp_path_factory.mktemp("run"))
            weights = four.run(trained, {**MODELS[model], **LAYOUTS[layout]}, STEPS, directory, SAVED_AT)[0]
            made[model, layout] = (weights, directory)
        return made[model, layout]

    return get


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "old", "new"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case)) for case in ALL],
)
def test_resume_gives_the_weights_of_a_run_that_was_never_stopped(four, saved, model, old, new):
    expected, directory = saved(model, old)
    start, weights = four.run(resumed, {**MODELS[model], **LAYOUTS[new]}, STEPS, directory)[0]
    assert start == SAVED_AT
    assert differences(expected, weights) == {}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_uninterrupted_runs_agree_across_layouts(saved, model):
    """The gradients are drawn by place, so this must hold; else the comparison above would compare different runs."""
    (first, _), (second, _) = (saved(model, layout) for layout in ("tp2+pp2", "m|L"))
    assert differences(first, second) == {}
