"""Saved at one layout and resumed at another, the next steps give bit-equal weights."""

from __future__ import annotations

import pytest

from tests.checkpoint.rig import CP2, DENSE, DP, EP2, MOE, PP2, TIED, TP2, VP2, differences, resumed, trained

pytestmark = pytest.mark.dist

SAVED_AT, STEPS = 2, 4
# Four layers behind the shared embedding, which has a bucket of its own: the buckets' padding lies between parameters.
PADDED = {**PP2, "model.pipeline_model_parallel_layout": "Etttt|mmL"}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """model and layout -> (weights of a run that was never stopped, a directory with its checkpoint), made once."""
    made = {}

    def get(name, model, layout):
        if name not in made:
            directory = str(tmp_path_factory.mktemp("run"))
            made[name] = (ranks(2).run(trained, {**model, **layout}, STEPS, directory, SAVED_AT)[0], directory)
        return made[name]

    return get


CASES = {
    "dense dp to dp": (DENSE, DP, DP),
    "dense dp to tp": (DENSE, DP, TP2),
    "dense dp to pp": (DENSE, DP, PP2),
    "dense dp to vp": (DENSE, DP, VP2),
    "dense dp to cp": (DENSE, DP, CP2),
    "dense tp to dp": (DENSE, TP2, DP),
    "dense vp to tp": (DENSE, VP2, TP2),
    "tied pp to dp": (TIED, PP2, DP),
    "padded pp to dp": (DENSE, PADDED, DP),
    "moe ep to ep": (MOE, EP2, EP2),
    "moe ep to tp": (MOE, EP2, TP2),
    "moe ep to pp": (MOE, EP2, PP2),
    "moe pp to ep": (MOE, PP2, EP2),
}
SLOW = {"dense dp to cp", "dense dp to vp", "dense tp to dp", "moe ep to ep", "moe ep to pp"}


@pytest.mark.parametrize(
    ("name", "model", "old", "new"),
    [
        pytest.param(*name.split(" to ")[:1], *case, marks=pytest.mark.slow if name in SLOW else (), id=name)
        for name, case in CASES.items()
    ],
)
def test_resume_gives_the_weights_of_a_run_that_was_never_stopped(ranks, saved, name, model, old, new):
    expected, directory = saved(name, model, old)
    start, weights = ranks(2).run(resumed, {**model, **new}, STEPS, directory)[0]
    assert start == SAVED_AT
    assert differences(expected, weights) == {}
