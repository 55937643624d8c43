"""Plans against runs that others published: how far they are off, and the page of the docs that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_fit import Fit, start
from benchmarks.plan_published import (
    REASONS,
    Errors,
    Prediction,
    halves,
    ordered_pairs,
    page,
    picture,
    predict_all,
    read_runs,
)

pytestmark = pytest.mark.unit
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def everything() -> list[Prediction]:
    return predict_all(read_runs(newest=False))


@pytest.fixture(scope="module")
def found(everything) -> list[Prediction]:
    return [one for one in everything if one.run.is_newest]


def test_the_runs_that_fitted_nothing_are_predicted(found):
    _, held = halves(found)
    errors = Errors.of(held)
    assert errors.median <= 0.08
    assert errors.within_20 >= 0.9
    assert [one.run.id for one in found if abs(one.error) > 0.3 and one.run.id not in REASONS] == []


def test_layouts_and_devices_are_ordered_as_published(everything):
    right, total = ordered_pairs(everything)
    assert total >= 50
    assert right / total >= 0.95


def test_every_run_has_its_source_and_counts_once():
    runs = read_runs()
    assert len(runs) >= 40
    assert len({run.id for run in runs}) == len(runs)
    for run in read_runs(newest=False):
        assert run.row["source"]
        assert run.row["tokens_per_s"] or run.row["mfu"]


def test_the_page_of_the_docs_is_the_planners(everything, found):
    again = "Write it again: python -m benchmarks.plan_published --write docs"
    assert page(found, everything) == (DOCS / "published_runs.md").read_text(encoding="utf-8"), again
    assert picture(found) == (DOCS / "published_runs.svg").read_text(encoding="utf-8"), again


def test_a_fit_starts_from_the_constants_as_they_are(found):
    run = found[0].run
    (one,) = Fit([run]).predict(start())
    assert one.predicted == pytest.approx(found[0].predicted)
