"""The command that trains healthy runs, in a short form: one run of each recipe raises no sign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_healthy_runs_raise_no_sign(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", "health", "--runs", "3", "--iters", "80", "--first-seed", "2000"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "found.json"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "3 healthy runs of 80 steps, 0 with a sign" in done.stdout
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(results) == 3
