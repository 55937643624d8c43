"""Saved at one layout and resumed at another, the next steps give bit-equal weights."""

from __future__ import annotations

import pytest

from tests.checkpoint.rig import CP2, DENSE, DP, EP2, MOE, PP2, TIED, TP2, VP2, differences, resumed, trained
from tests.gloo_pool import GlooPool

pytestmark = pytest.mark.dist

SAVED_AT, STEPS = 2, 4


@pytest.fixture(scope="module")
def pool():
    with GlooPool(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """model and layout -> (weights of a run that was never stopped, a directory with its checkpoint), made once."""
    made = {}

    def get(name, model, layout):
        if name not in made:
            directory = str(tmp_path_factory.mktemp("run"))
            made[name] = (pool.run(trained, {**model, **layout}, STEPS, directory, SAVED_AT)[0], directory)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "model", "old", "new"),
    [
        ("dense-dp", DENSE, DP, DP),
        ("dense-dp", DENSE, DP, TP2),
        ("dense-dp", DENSE, DP, PP2),
        ("dense-dp", DENSE, DP, VP2),
        ("dense-dp", DENSE, DP, CP2),
        ("dense-tp", DENSE, TP2, DP),
        ("dense-vp", DENSE, VP2, TP2),
        ("tied-pp", TIED, PP2, DP),
        ("moe-ep", MOE, EP2, EP2),
        ("moe-ep", MOE, EP2, TP2),
        ("moe-ep", MOE, EP2, PP2),
        ("moe-pp", MOE, PP2, EP2),
    ],
)
def test_resume_gives_the_weights_of_a_run_that_was_never_stopped(pool, saved, name, model, old, new):
    expected, directory = saved(name, model, old)
    start, weights = pool.run(resumed, {**model, **new}, STEPS, directory)[0]
    assert start == SAVED_AT
    assert differences(expected, weights) == {}
