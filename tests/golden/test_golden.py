"""Twenty steps of each small model follow the curve that was kept, within the rounding of fp32."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GOLDEN = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "golden_curves.py"))
QUICK = ("dense_1",)
TOLERANCE = 2e-5
"""Relative, of each loss and gradient norm. Processors round differently, and twenty steps add it up."""

Curve = list[tuple[str, int, list[float]]]


def parse(text: str) -> Curve:
    """(kind, iteration, values) of each line but the comments; NaN where a value was not recorded."""
    rows = [line.replace("None", "nan").split() for line in text.splitlines() if not line.startswith("#")]
    return [(kind, int(iteration), [float(value) for value in values]) for kind, iteration, *values in rows]


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in GOLDEN["RUNS"]]
)
def test_the_curve_is_the_one_that_was_kept(name):
    kept, fresh = parse((GOLDEN["FOLDER"] / f"{name}.txt").read_text()), parse(GOLDEN["text_of"](name))
    for (*row, expected), (*fresh_row, values) in zip(kept, fresh, strict=True):
        assert fresh_row == row
        assert values == pytest.approx(expected, rel=TOLERANCE, nan_ok=True), row


@pytest.mark.unit
def test_every_run_has_its_file():
    assert {path.stem for path in GOLDEN["FOLDER"].glob("*.txt")} == set(GOLDEN["RUNS"])
