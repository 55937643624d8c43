"""Twenty optimizer steps from the same seed give the same curve at every layout."""

from __future__ import annotations

import pytest

from tests.layouts.matrix import LAYOUTS

pytestmark = pytest.mark.dist

NUM_STEPS = 20
FAST = {
    ("dense", "tp=2,sp=1"),
    ("dense", "pp=2,vp=2"),
    ("dense", "dp=2,distopt=1,overlap=1"),
    ("mla_moe", "ep=2"),
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=[] if (model, layout) in FAST else [pytest.mark.slow])
        for model, layouts in LAYOUTS.items()
        for layout in layouts
    ],
)
def test_twenty_steps_give_one_curve(compared, model, layout, record_property):
    difference = compared(model, layout, "padded", curve_steps=NUM_STEPS)
    # With experts, rounding sends some token to another expert sooner or later; from there on curves part.
    record_property("steps with equal routing", difference.curve_steps)
    print(f"{model}, {layout}: {difference.curve_steps} steps with equal routing, curve {difference.curve:.1e}")
    assert difference.faults() == []
    assert difference.curve_steps == NUM_STEPS if model == "dense" else difference.curve_steps > 0
