"""On four ranks: saved at each layout and resumed at each other one, the next steps give bit-equal weights."""

from __future__ import annotations

import pytest

from tests.checkpoint.four_layouts import LAYOUTS, MODELS, SavedRuns, every_case
from tests.checkpoint.rig import differences, resumed, trained

FAST = [("dense", "tp2+pp2", "m|L")]
SAVED_AT, STEPS = 2, 4


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> SavedRuns:
    """The weights of runs that were never stopped."""
    return SavedRuns(
        lambda values, directory: ranks(4).run(trained, values, STEPS, directory, SAVED_AT)[0], tmp_path_factory
    )


@pytest.mark.dist
@every_case(FAST)
def test_resume_gives_the_weights_of_a_run_that_was_never_stopped(ranks, saved, model, old, new):
    expected, directory = saved(model, old)
    start, weights = ranks(4).run(resumed, {**MODELS[model], **LAYOUTS[new]}, STEPS, directory)[0]
    assert start == SAVED_AT
    assert differences(expected, weights) == {}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_uninterrupted_runs_agree_across_layouts(saved, model):
    """The gradients are drawn by place, so this must hold; else the comparison above would compare different runs."""
    (first, _), (second, _) = (saved(model, layout) for layout in ("tp2+pp2", "m|L"))
    assert differences(first, second) == {}
