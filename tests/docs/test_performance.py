"""docs/performance.md says what benchmarks/results hold, and every benchmark is listed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import names
from benchmarks.page import PAGE, RESULTS, ROOT, RUNS, filled

pytestmark = pytest.mark.unit


def test_the_tables_are_made_from_the_results():
    page = PAGE.read_text()
    assert filled(page) == page, "run python -m benchmarks.page"
    assert re.findall(r"<!-- (?!end)(\w+) -->", page) == list(RUNS)
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(RUNS)


def test_every_run_names_a_benchmark_that_has_a_line():
    known = names()
    assert {command[0] for command in RUNS.values()} <= known.keys()
    assert all(line.endswith(".") for line in known.values())


def test_the_list_is_printed():
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(name in done.stdout for name in names())


SHORT = {
    "head": ["--tokens", "64", "--vocab", "512", "--rounds", "6"],
    "loop": ["--rounds", "6"],
    "monitoring": ["--rounds", "6", "--small"],
    "start": ["--rounds", "6"],
    "prepare": ["--megabytes", "1", "--rounds", "6"],
    "load": ["--sets", "3", "--documents", "200", "--rounds", "6"],
    "checkpoint": ["--hidden", "64", "--rounds", "6"],
    "experts": ["--sizes", "1", "--rounds", "6"],
    "step": ["--layers", "1", "--seq", "64", "--depths", "0", "1", "2", "--rounds", "6"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_short_form_runs(name: str, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", name, *SHORT[name], "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "machine" in (tmp_path / "found.json").read_text()
