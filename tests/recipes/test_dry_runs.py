"""Every recipe of a released model builds, stage by stage, at its own parallel sizes, and holds what is predicted."""

from __future__ import annotations

import pytest

from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe
from megatron_mtp.recipes.published import PUBLISHED

pytestmark = pytest.mark.unit
FAST = ("smollm2_135m", "moonlight_16b_a3b")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PUBLISHED]
)
def test_recipe_builds(name):
    from megatron_mtp.dry_run.build import dry_run

    cfg = get_recipe(name)
    world_size = minimum_world_size(cfg.copy().finalize().model)
    cfg.finalize(world_size)
    found = dry_run(resolve(cfg, world_size))
    assert found.problems == []
    assert len(found.stages) == cfg.model.pipeline_model_parallel_size
    for stage in found.stages:
        assert {built.parameters for built in stage.built} == {stage.predicted_parameters}
    assert found.parameters == count_parameters(cfg.model).total
