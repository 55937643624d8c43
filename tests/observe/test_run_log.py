"""A log read as columns says the same as read line by line, also while it is written."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.errors import DataError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.run_log import RunLog, open_log
from tests.report.logs import LOGS, LogWriter, step

pytestmark = pytest.mark.unit


def assert_says_the_same(log: RunLog, path: Path) -> None:
    steps = read_metrics(path)
    names = {name for line in steps for name in line if name not in ("kind", "iteration", "time")}
    assert set(log.names()) - {"time"} == names - {"time"}
    for name in names:
        known = [(line["iteration"], line[name]) for line in steps if name in line]
        at, value = log.column(name)
        assert at.tolist() == [iteration for iteration, _ in known]
        np.testing.assert_array_equal(value, [one for _, one in known])
    for kind in ("warning", "fault", "end"):
        assert [line for line in log.texts if line["kind"] == kind] == read_metrics(path, kind)
    assert repr(log.evaluations) == repr(read_metrics(path, "evaluation"))


@pytest.mark.parametrize("name", LOGS)
def test_columns_say_what_the_lines_say(tmp_path: Path, name: str):
    path = LOGS[name](tmp_path).path
    assert_says_the_same(open_log(tmp_path), path)


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_grows_by_any_pieces_is_read_as_a_whole_one(tmp_path: Path, name: str):
    content = LOGS[name](tmp_path / "whole").path.read_bytes()
    draw, path = random.Random(name), tmp_path / "metrics.jsonl"
    path.touch()
    log, written = RunLog(path), 0
    while written < len(content):
        piece = draw.randrange(1, 3000)
        with path.open("ab") as file:
            file.write(content[written : written + piece])
        written += piece
        log.update()
        assert not log.update()
    assert_says_the_same(log, path)


def test_steps_done_again_count_as_lost(tmp_path: Path):
    log = LOGS["killed_and_resumed"](tmp_path)
    found = open_log(log.path)
    assert [(one.line["iteration"], one.lost) for one in found.interruptions] == [(20, 9), (40, 10), (45, 0)]
    assert found.first["iteration"] == 0
    assert found.start["iteration"] == 45
    (rollback,) = open_log(LOGS["rolled_back"](tmp_path / "other").path).interruptions
    assert rollback.lost == 10


def test_a_fresh_start_in_the_same_file_forgets_what_was_before(tmp_path: Path):
    log = LogWriter(tmp_path).start().steps(1, 9).line("warning", 5, text="old")
    log.resume(0).steps(1, 3)
    found = open_log(tmp_path)
    assert found.column("lm loss")[0].tolist() == [1, 2, 3]
    assert not found.interruptions
    assert not found.texts


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path):
    log = LogWriter(tmp_path).start().steps(1, 9)
    found = open_log(tmp_path)
    log.path.write_text("")
    log.start().steps(1, 2)
    assert found.update()
    assert found.column("lm loss")[0].tolist() == [1, 2]


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path):
    log = LogWriter(tmp_path).start().steps(1, 2)
    with log.path.open("a") as file:
        file.write('[1]\n7\n\n{"kind": "step"}\n{"a": "te\n')
    log.steps(3, 4)
    assert open_log(tmp_path).column("lm loss")[0].tolist() == [1, 2, 3, 4]


def test_a_metric_that_comes_and_goes_keeps_its_steps(tmp_path: Path):
    log = LogWriter(tmp_path).start()
    for iteration in range(1, 7):
        log.line("step", iteration, **step(iteration, **({"rare": float(iteration)} if iteration % 3 == 0 else {})))
    at, value = open_log(tmp_path).column("rare")
    assert at.tolist() == value.tolist() == [3, 6]
    assert [len(part) for part in open_log(tmp_path).column("never")] == [0, 0]


def test_the_log_is_found_by_either_folder(tmp_path: Path):
    LogWriter(tmp_path / "logs").start()
    beside = tmp_path / "checkpoints.metrics.jsonl"
    beside.write_bytes((tmp_path / "logs" / "metrics.jsonl").read_bytes())
    assert open_log(tmp_path / "logs").path.name == "metrics.jsonl"
    assert open_log(tmp_path / "checkpoints").path == beside
    assert open_log(beside).path == beside
    with pytest.raises(DataError, match="no log of a run"):
        open_log(tmp_path / "nothing")
