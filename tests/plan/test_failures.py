"""Expected time under failures, the best interval between saves, spare nodes: closed forms against simulations."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest

from megatron_mtp.plan.failures import Failures, spare_nodes

pytestmark = pytest.mark.unit
HOUR = 3600.0
RUNS = 10_000


@pytest.mark.parametrize(
    ("failures", "interval_s"),
    [
        (Failures(mtbf_s=3 * HOUR, save_s=60, restart_s=900), 1800),
        (Failures(mtbf_s=HOUR, save_s=120, restart_s=600), 900),
        (Failures(mtbf_s=HOUR, save_s=5, restart_s=HOUR), 300),  # half of the restarts fail too
        (Failures(mtbf_s=24 * HOUR, save_s=300, restart_s=0), 7200),
    ],
)
def test_the_closed_form_agrees_with_ten_thousand_simulated_trainings(failures, interval_s):
    work_s = 24 * interval_s
    times = failures.simulate_s(work_s, interval_s, RUNS)
    assert mean(times) == pytest.approx(failures.expected_s(work_s, interval_s), rel=0.01)


def test_a_simulation_agrees_with_one_that_goes_second_by_second():
    """A plain reference: a clock that ticks, and a failure in each second with the same probability."""
    failures, rng = Failures(mtbf_s=40, save_s=2, restart_s=5), random.Random(1)

    def one_run(pieces: int, interval: int) -> int:
        clock = done = 0
        since = -0  # seconds of the piece that runs, or minus those of the restart that are left
        while done < pieces:
            clock += 1
            since += 1
            if rng.random() < 1 / 40:
                since = -5
            elif since == interval + 2:
                done, since = done + 1, 0
        return clock

    ticking = mean(one_run(10, 12) for _ in range(2000))
    assert mean(failures.simulate_s(120, 12, RUNS)) == pytest.approx(ticking, rel=0.06)


@pytest.mark.parametrize("save_s", [1.0, 30.0, 600.0])
@pytest.mark.parametrize("mtbf_s", [0.5 * HOUR, 10 * HOUR, 1000 * HOUR])
def test_the_best_interval_is_the_minimum_and_near_its_approximations(save_s, mtbf_s):
    failures = Failures(mtbf_s=mtbf_s, save_s=save_s, restart_s=300)
    best = failures.best_interval_s()
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert failures.expected_s(1e6, best) <= failures.expected_s(1e6, best * factor)
    assert failures.daly_s() == pytest.approx(best, rel=0.01)
    if save_s < mtbf_s / 100:
        assert failures.young_s() == pytest.approx(best, rel=0.08)


def test_the_best_interval_beats_its_neighbours_in_simulation():
    failures = Failures(mtbf_s=HOUR, save_s=120, restart_s=600)
    best, work_s = failures.best_interval_s(), 12 * HOUR
    shortest = mean(failures.simulate_s(work_s, best, RUNS))
    for factor in (0.5, 2.0):
        assert shortest < mean(failures.simulate_s(work_s, best * factor, RUNS, seed=1))


def test_without_failures_only_saves_cost_time():
    never = Failures(mtbf_s=math.inf, save_s=10, restart_s=100)
    assert never.expected_s(1000, 100) == 1100
    assert never.simulate_s(1000, 100, 3) == [1100] * 3
    assert math.isinf(never.best_interval_s())


def test_failures_that_leave_no_progress_take_forever():
    assert math.isinf(Failures(mtbf_s=1, save_s=1000, restart_s=0).expected_s(1e6, 100))


def test_spare_nodes_suffice_as_often_as_promised():
    """Against draws of the number of broken nodes."""
    rng, nodes, mtbf_s, repair_s = random.Random(0), 200, 1000 * HOUR, 24 * HOUR
    spares = spare_nodes(nodes, mtbf_s, repair_s)

    def broken() -> int:
        clock = count = 0
        while (clock := clock + rng.expovariate(nodes / mtbf_s)) < repair_s:
            count += 1
        return count

    draws = [broken() for _ in range(20_000)]
    assert mean(count <= spares for count in draws) >= 0.985
    assert mean(count <= spares - 1 for count in draws) < 0.99
    assert spare_nodes(100_000, mtbf_s, repair_s) == pytest.approx(2400 + 2.33 * math.sqrt(2400), rel=0.01)
