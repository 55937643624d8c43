"""Models and layouts on four ranks, from each of which runs are resumed at each other one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.checkpoint.rig import DENSE, MOE

Case = tuple[str, str, str]
"""(model, layout that saves, layout that resumes)."""
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


def layouts_of(model: str) -> list[str]:
    return [name for name in LAYOUTS if model == "moe" or "ep" not in name]


ALL = [(model, old, new) for model in MODELS for old, new in itertools.permutations(layouts_of(model), 2)]


def every_case(fast: list[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test by (model, old, new); all but those in `fast` are slow."""
    cases = [pytest.param(*case, marks=() if case in fast else pytest.mark.slow, id="-".join(case)) for case in ALL]
    return pytest.mark.parametrize(("model", "old", "new"), cases)


class SavedRuns:
    """Runs that were never stopped, each made once: (result of `make`, the directory with its checkpoint).

    Args:
        make: (config values, directory) -> what is kept of the run.
    """

    def __init__(self, make: Callable[[dict[str, Any], str], Any], factory: pytest.TempPathFactory):
        self._make, self._factory = make, factory
        self._made: dict[tuple[str, str], tuple[Any, str]] = {}

    def __call__(self, model: str, layout: str) -> tuple[Any, str]:
        if (model, layout) not in self._made:
            directory = str(self._factory.mktemp("run"))
            self._made[model, layout] = self._make({**MODELS[model], **LAYOUTS[layout]}, directory), directory
        return self._made[model, layout]
