"""The progress bar in a real terminal, and its absence elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPT = """
import logging, sys
from megatron_mtp.config import ConfigContainer
from megatron_mtp.observe.recorder import Recorder, RunInfo
from megatron_mtp.observe.logs import setup_logging
from tests.observe.records import make_record

setup_logging()
cfg = ConfigContainer()
cfg.logger.log_interval = 5
recorder = Recorder(cfg, RunInfo(iteration=10, train_iters=20), True)
for iteration in range(11, 21):
    recorder.step(make_record(iteration, train_iters=20))
    if iteration == 12:
        logging.getLogger("megatron_mtp.x").warning("[a warning]")
        print("printed by another package", file=sys.stderr)
if sys.argv[1] == "crash":
    raise RuntimeError("boom")
recorder.close()
"""


def run_in_terminal(argument: str) -> str:
    """What a terminal of 100 columns is sent."""
    ours, theirs = pty.openpty()
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, argument], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    received = b""
    try:
        while chunk := os.read(ours, 65536):
            received += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    process.wait(timeout=30)
    return received.decode()


def test_lines_scroll_by_above_the_bar():
    text = run_in_terminal("")
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)
    assert "20/20" in plain
    assert "lm 7.969  mtp_1 7.925" in plain
    assert re.search(r"left +0:00:00", plain)
    whole = re.compile(r"^ \[.*\] iteration +15/ +20 \|.*\| MFU: 0.3158 \|\r?$", re.MULTILINE)
    assert len(whole.findall(plain.replace("\r", "\n"))) == 1
    for line in ("[a warning]", "printed by another package"):
        # The bar's line is erased before another is printed.
        assert re.search(r"\x1b\[2K[^\n]*" + re.escape(line), text), line


def test_a_crash_gives_the_cursor_back():
    text = run_in_terminal("crash")
    assert "RuntimeError: boom" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_no_bar_outside_a_terminal():
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ""], capture_output=True, text=True, timeout=60, env=environ, check=True
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.count("] iteration ") == 3
    assert "WARNING megatron_mtp.x: [a warning]" in done.stderr
