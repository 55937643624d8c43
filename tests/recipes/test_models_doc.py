"""docs/models.md is what the recipes say, and every size rounds to what is published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mtp.config.machines import MACHINES
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.plan.compare import default_devices, make_plans
from megatron_mtp.recipes import RECIPES, get_recipe, recipe_function
from megatron_mtp.recipes.published import PUBLISHED, Figure
from scripts.models_doc import agrees, counted, render, unpadded

pytestmark = pytest.mark.unit
DOC = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    count, published = count_parameters(unpadded(name)), PUBLISHED[name]
    assert agrees(counted(count, published.total.counted, active=False), published.total)
    if published.active is not None:
        assert agrees(counted(count, published.active.counted, active=True), published.active)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_fits_the_gpus_that_it_is_for(name):
    """Also without --devices, which then means these GPUs."""
    cfg, gpus = get_recipe(name), PUBLISHED[name].gpus
    assert default_devices(name, cfg) == gpus
    plans = make_plans(cfg, gpus)  # raises PlanError if it does not
    assert plans.machine is MACHINES["h100"]
    assert plans.chosen.peak_bytes <= plans.limit_bytes


def test_a_changed_recipe_is_planned_on_the_gpus_that_it_is_for_or_on_one_replica():
    cfg = get_recipe("llama3_8b")
    cfg.model.context_parallel_size = 2
    assert default_devices("llama3_8b", cfg) == 8
    cfg.model.pipeline_model_parallel_size = 32
    assert default_devices("llama3_8b", cfg) == 64
    assert default_devices("tiny_dense", get_recipe("tiny_dense")) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_no_docstring_repeats_the_number_of_gpus(name):
    assert not re.search(r"\d+ GPU|GPUs? of", " ".join((recipe_function(name).__doc__ or "").split()))


def test_a_figure_agrees_with_its_own_digits_only():
    assert agrees(671_026_000_000, Figure(text="671B"))
    assert not agrees(671_500_000_000, Figure(text="671B"))
    assert agrees(3_353_000_000, Figure(text="3.3B", is_cut=True))
    assert not agrees(3_353_000_000, Figure(text="3.3B"))
    assert not agrees(3_299_000_000, Figure(text="3.3B", is_cut=True))


def test_every_recipe_of_a_released_model_is_in_the_table():
    """Families have folders; tiny models, the demo and recipes for other work do not."""
    assert set(PUBLISHED) == {name for name, place in RECIPES.items() if "." in place.partition(":")[0]}


def test_the_document_has_not_drifted():
    assert DOC.read_text(encoding="utf-8") == render(), "python -m scripts.models_doc > docs/models.md"
