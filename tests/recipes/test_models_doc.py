"""docs/models.md is what the recipes say, and every size rounds to what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.recipes import RECIPES
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
