from __future__ import annotations

import random

import pytest

from benchmarks.timing import Timing, in_turn

pytestmark = pytest.mark.unit


def test_the_interval_holds_the_median_in_95_of_100_repetitions():
    assert (Timing.of(list(range(1, 10))).low, Timing.of(list(range(1, 10))).high) == (2, 8)  # 96.1 %, by the binomial
    draw, inside = random.Random(3), 0
    for _ in range(2000):
        timing = Timing.of([draw.random() for _ in range(9)])
        inside += timing.low <= 0.5 <= timing.high
    assert 0.95 <= inside / 2000 <= 0.975


def test_sides_take_turns_in_an_order_that_alternates():
    order: list[str] = []
    timings = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 6)
    assert "".join(order[4:]) == "abba" * 3
    assert {name: len(timing.times) for name, timing in timings.items()} == {"a": 6, "b": 6}
