"""Any input ends in a config that reads back, or in an error of this project: in time, and in little memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe
from tests.config import fuzz

pytestmark = pytest.mark.unit

FAST, CHUNK, CASES = 2000, 2000, 20_000


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, FAST), *(pytest.param(first, CHUNK, marks=pytest.mark.slow) for first in range(CHUNK, CASES, CHUNK))],
)
def test_hostile_input_ends_well(first, count):
    command = [sys.executable, "-m", "tests.config.fuzz", str(first), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout == ""


@pytest.mark.parametrize(("num_layers", "pp"), [(1000, 50), (1000, 4), (300, 40)])
def test_large_pipelines_are_planned_in_seconds(num_layers, pp):
    cfg = get_recipe("tiny_dense")
    cfg.model.update(num_layers=num_layers, pipeline_model_parallel_size=pp)
    start = time.process_time()
    resolve(cfg.finalize())
    assert time.process_time() - start < 8


def test_a_failure_is_seen(monkeypatch):
    """Else silence would prove nothing."""

    def crash(rng):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "KINDS", [crash])
    assert "KeyError" in str(fuzz.run_case(1))
