"""A run that is killed again and again comes to the weights and the curve of one that was never stopped.

The whole form, 25 kills, is `python benchmarks/kill_test.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist
PROGRAM = Path(__file__).parents[3] / "benchmarks/kill_test.py"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_leave_no_trace(ranks: int):
    command = [sys.executable, str(PROGRAM), "--kills", "3", "--steps", "24", "--seed", "2", "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 kills, 0 differences" in done.stdout
