"""Any input ends in a config that reads back, or in an error of this project: in time, and in little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_a_failure_is_seen(monkeypatch):
    """Else silence would prove nothing."""
    from tests.config import fuzz

    def crash(rng):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "KINDS", [crash])
    assert "KeyError" in str(fuzz.run_case(1))
