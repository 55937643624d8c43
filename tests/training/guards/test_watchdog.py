"""A job that hangs ends in time, with the stack of every rank and the names of those who hold it up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_mtp.launch import local as launch_module
from megatron_mtp.launch.local import run_ranks
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training.callbacks.stragglers import stragglers
from megatron_mtp.training.guards.watchdog import EXIT_CODE, RankReport, report

FROZEN = ("frozen", "first frozen")


def hang(folder: Path, how: str) -> int:
    return run_ranks([sys.executable, "-m", "tests.training.guards.hanging_rank", str(folder), how], 2)


@pytest.mark.dist
@pytest.mark.parametrize("how", ["asleep", *(pytest.param(how, marks=pytest.mark.slow) for how in FROZEN)])
def test_a_hung_job_ends_with_the_stacks(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setattr(launch_module, "TERM_S", 1.0)
    code = hang(tmp_path, how)
    ended = time.time()
    err = capfd.readouterr().err
    assert code == EXIT_CODE, err[-3000:]
    assert "no progress for 6 s (dist.watchdog_s)" in err
    assert f"---- rank {int(how == 'first frozen')} " in err
    assert "at: iteration 3: agreeing with all ranks whether to save or leave" in err
    assert re.search(r'preemption\.py", line \d+ in decide', err), "where a rank waits"
    if how == "asleep":
        assert re.search(r"behind the others: rank 1 on .*, at: (a micro-batch|iteration 3: the step)", err)
        assert re.search(r'hanging_rank\.py", line \d+ in on_step_end', err), "where rank 1 is"
    elif how == "frozen":
        assert "ranks without a report, dead or frozen: 1" in err
    else:
        assert "the job's store does not answer: what serves it, rank 0 or torchrun's agent" in err
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["iteration"] == (2 if how == "first frozen" else 3)  # rank 0 writes the records
    # The watchdog's time, the collection of stacks, and the launcher's patience with the others.
    assert ended - last["time"] < 6 + 1 + 5 + 2 + 6


@pytest.mark.dist
def test_a_frozen_rank_0_that_serves_the_store_is_reported_in_time():
    """It takes every question and never answers, so a watchdog that waits for the answer never reports."""
    command = [sys.executable, "-m", "tests.training.guards.frozen_store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        frozen_at = float(process.stdout.readline())
        code = process.wait(timeout=60)
        took_s = time.time() - frozen_at
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    err = process.stderr.read()
    assert code == EXIT_CODE, err
    assert "no progress for 1 s (dist.watchdog_s)" in err
    assert "what serves it, rank 0 or torchrun's agent, is dead or frozen" in err
    assert "---- rank 1 " in err
    assert re.search(r'frozen_store\.py", line \d+ in wait_for_rank_0', err), "where rank 1 waits"
    assert took_s < 1 + 2 * 1 + 2  # the timeout, a question and the collection, and a slow machine


@pytest.mark.dist
@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path, capfd):
    assert hang(tmp_path, "slow") == 0
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "is slow" in line]
    assert "rank 1 on " in warning
    (sign,) = read_metrics(tmp_path / "metrics.jsonl", "warning")
    assert (sign["sign"], sign["iteration"]) == ("slow rank", 20)


@pytest.mark.unit
def test_who_is_a_straggler():
    everyone = [(1.0, "a"), (1.1, "a"), (0.9, "b"), (1.6, "b")]
    (one,) = stragglers(everyone, 1.5)
    assert one.startswith("rank 3 on b is slow: 1600 ms until its gradients are computed, 1.6 times the median")
    assert stragglers(everyone, 2.0) == []


@pytest.mark.unit
def test_the_report_says_who_holds_the_job_up():
    def one(rank: int, beats: int) -> RankReport:
        return RankReport(rank, "h", f"step of {rank}", beats, 6.5, f"stack of {rank}")

    text = report([one(0, 7), one(1, 5), one(3, 7)], 4, 6.0)
    assert "dead or frozen: 2" in text
    assert "behind the others: rank 1 on h, at: step of 1" in text
    assert [f"stack of {rank}" in text for rank in range(4)] == [True, True, False, True]
    assert "all wait at the same place" in report([one(0, 7), one(1, 7)], 2, 6.0)
