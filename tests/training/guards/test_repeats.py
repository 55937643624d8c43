"""Reports that come at nearly every step become few lines."""

from __future__ import annotations

import pytest

from megatron_mtp.training.guards.repeats import QUIET_STEPS, Repeats

pytestmark = pytest.mark.unit


def shown(bad: set[int], steps: int) -> dict[int, str]:
    """Step -> the line shown then, for a run with a report at each of `bad`."""
    repeats, lines = Repeats(), {}
    for step in range(1, steps + 1):
        lines[step] = repeats.add(step, f"spike {step}.") if step in bad else repeats.quiet(step)
    lines[steps + 1] = repeats.end()
    return {step: line for step, line in lines.items() if line}


def test_each_of_many_steps():
    lines = shown(set(range(5, 34)), 33)
    assert list(lines) == [5, 14, 34]
    assert lines[5] == "spike 5."
    assert lines[14] == "spike 14. The 10th such step since iteration 5."
    assert lines[34].startswith("iterations 5 to 33: 29 steps were reported")


def test_a_series_ends_after_quiet_steps_and_the_next_one_is_shown_again():
    lines = shown({3, 5, 6, 40}, 60)
    assert list(lines) == [3, 6 + QUIET_STEPS, 40]
    assert "3 to 6: 3 steps" in lines[6 + QUIET_STEPS]


def test_single_reports_are_shown_as_they_are():
    assert shown({5, 30}, 60) == {5: "spike 5.", 30: "spike 30."}


def test_thousands_of_steps_give_a_line_for_each_power_of_ten():
    assert list(shown(set(range(1, 2001)), 2000)) == [1, 10, 100, 1000, 2001]
