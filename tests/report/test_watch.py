"""A run in a terminal: 80 columns of plain text, whatever its log looks like, until it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.observe.run_log import open_log
from megatron_mtp.report.curves import Curve
from megatron_mtp.report.watch import follow, screen, small_curve
from tests.report.logs import LOGS, LogWriter

pytestmark = pytest.mark.unit

CHANGES = (("warning", 20, "mtp_1 loss rose"), ("recovery", 30, "it is over"), ("autotune", 35, "halved"))
"""Kind, iteration and text of lines."""


@pytest.mark.parametrize("name", LOGS)
def test_a_screen_is_plain_text_of_80_columns(tmp_path: Path, name: str):
    lines = screen(open_log(LOGS[name](tmp_path).path), time.time())
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert any(line.startswith("lm ") for line in lines)


def test_a_screen_says_what_the_log_says(tmp_path: Path):
    log = open_log(LOGS["rolled_back"](tmp_path / "rolled_back").path)
    text = "\n".join(screen(log, time.time()))
    assert text.startswith("rolled_back: tiny, step 60 of 100 (60%)\nleft: SIGTERM\n")
    depth = next(line.split() for line in text.splitlines() if line.startswith("mtp_1"))
    loss, main_loss = log.column("mtp_1 loss")[1], log.column("lm loss")[1]
    assert depth[1:6] == [
        f"{loss[-1]:.4f}",
        f"{loss[-20:].mean():.4f}",
        f"{(loss - main_loss)[-20:].mean():.4f}",
        "60.0%",
        "-",  # the evaluation was done before the rollback
    ]
    assert "31 fault: lm loss is nan" in text
    assert "back to iteration 20, 10 steps again" in text
    assert "0:00:" not in text  # nothing is left of a run that has ended
    assert "0:00:11 left" in "\n".join(screen(open_log(LOGS["going_on"](tmp_path).path), time.time()))  # 60 x 199 ms


def test_signs_that_begin_and_end_and_what_was_done_are_shown(tmp_path: Path):
    log = LogWriter(tmp_path / "run").start().steps(1, 40)
    for kind, step, text in CHANGES:
        log.line(kind, step, text=f"iteration {step}: {text}")
    shown = screen(open_log(log.path), time.time())
    assert [line.split(maxsplit=1) for line in shown[-3:]] == [
        ["20", "sign: mtp_1 loss rose"],
        ["30", "recovery: it is over"],
        ["35", "autotune: halved"],
    ]


def test_a_small_curve_shows_its_shape_and_what_is_not_finite():
    falling = small_curve(Curve(np.arange(8.0), np.arange(8.0)[::-1]), 8)
    assert falling == "█▇▆▅▄▃▂▁"
    assert small_curve(Curve(np.arange(4.0), np.array([1, np.nan, 2, np.inf])), 4) == "▁!█!"
    assert small_curve(Curve(np.arange(2.0), np.full(2, np.nan)), 4) == "!!"
    assert small_curve(Curve(np.arange(3.0), np.ones(3)), 4) == "▁▁▁"


def test_it_follows_a_run_to_its_end(tmp_path: Path):
    log = LogWriter(tmp_path).start().steps(1, 5)
    found = follow(open_log(log.path), 0.01)
    assert "step 5 of 100" in next(found)[0]
    log.steps(6, 9)
    assert "step 9 of 100" in next(found)[0]
    assert "step 9 of 100" in next(found)[0]  # the age of the last record changes
    log.line("end", 9, text="left: SIGTERM")
    assert any(lines[1] == "left: SIGTERM" for lines in found)


def test_the_command_prints_once_or_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    LogWriter(tmp_path).start().steps(1, 100)
    for options in (["--once"], []):
        with pytest.raises(SystemExit) as left:
            main(["watch", str(tmp_path), *options])
        assert not left.value.code
        assert "step 100 of 100 (100%)\ncomplete\n" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path):
    import signal

    LogWriter(tmp_path, time.time()).start().steps(1, 5)
    command = [sys.executable, "-m", "megatron_mtp", "watch", str(tmp_path), "--interval", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "step 5 of 100" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in errors
