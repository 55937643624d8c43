"""Profiles say how sure they are: spread, drift and other programs on the same cores."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from statistics import median

import pytest

from megatron_mtp.profile.noise import Load, Noise, busy_seconds, noise_of_notes

pytestmark = pytest.mark.unit


def times(spread: float, drift: float = 0.0, count: int = 48) -> list[float]:
    rng = random.Random(3)
    return [100 * (1 + rng.gauss(0, spread)) * (1 + drift * (n >= count // 2)) for n in range(count)]


def test_steady_times_are_quiet_and_the_median_is_as_sure_as_it_says():
    noise = Noise.of(times(0.05))
    assert noise.is_quiet
    assert "quiet" in noise.words()
    rng, medians = random.Random(0), []
    for _ in range(2000):
        medians.append(median(100 * (1 + rng.gauss(0, 0.05)) for _ in range(48)))
    within = sum(abs(one / 100 - 1) <= 2 * 1.25 * 0.05 / 48**0.5 for one in medians) / len(medians)
    assert 0.93 < within < 0.98
    assert noise.uncertainty == pytest.approx(2 * 1.25 * 0.05 / 48**0.5, rel=0.5)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (Noise.of(times(0.3)), "half of the micro-batches differ"),
        (Noise.of(times(0.01, drift=0.2)), "the second half took +20%"),
        (Noise.of(times(0.01), crowding=0.7), "other programs took 0.7 of the cores"),
        (Noise.of(times(0.01, count=4)), "4 micro-batches are too few"),
        (Noise.of([1.0]), "1 micro-batches are too few"),
    ],
)
def test_what_speaks_against_a_profile_is_said(noise, words):
    assert not noise.is_quiet
    assert words in noise.words()
    assert json.loads(json.dumps(noise.as_notes(), allow_nan=False))["is_quiet"] is False


def test_one_interruption_is_no_noise():
    assert Noise.of([*times(0.02), 1000.0]).is_quiet


def test_a_plan_says_that_its_profile_is_not_sure():
    busy = {"noise": Noise.of(times(0.01), crowding=0.4).as_notes()}
    assert noise_of_notes(busy) == " (not on a quiet machine, times may be 40% off)"
    assert noise_of_notes({"noise": Noise.of(times(0.01)).as_notes()}) == ""
    assert noise_of_notes({}) == ""  # a profile of an earlier version
    assert noise_of_notes({"noise": "none"}) == ""


@pytest.mark.skipif(busy_seconds() is None, reason="needs /proc/stat, which only Linux has")
def test_other_programs_are_seen_where_they_take_needed_cores():
    load, start = Load(), time.perf_counter()
    code = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    wall, cores = time.perf_counter() - start, os.cpu_count() or 1
    found = load.crowding(own_s=0.0, wall_s=wall, own_cores=cores)  # all cores are needed
    assert found is not None
    assert found > 0.2 / wall
    assert load.crowding(own_s=1e9, wall_s=wall, own_cores=cores) == 0.0  # it was all our own
