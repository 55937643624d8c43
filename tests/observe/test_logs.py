"""Which log lines are shown, and what is filtered."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


def heard(code: str, **environ: str) -> list[str]:
    """Lines on stderr of a process that runs `code` after `log` was made."""
    code = (
        "import logging, warnings\nfrom megatron_mtp.observe.logs import setup_logging\n"
        "log = logging.getLogger('megatron_mtp.a')\n" + code
    )
    environ = (
        {k: v for k, v in os.environ.items() if k != "MEGATRON_MTP_LOG"}
        | {"PYTHONPATH": str(Path(__file__).parents[2])}
        | environ
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ, check=True
    )
    return done.stderr.splitlines()


SPEAK = """
log.debug("detail"); log.info("news"); log.warning("care")
log.info("here", extra={"all_ranks": True}); log.error("bad"); logging.getLogger("other").info("chatter")
"""


def test_rank_0_speaks():
    assert heard("setup_logging(0)" + SPEAK) == [
        "news",
        "WARNING megatron_mtp.a: care",
        "here",
        "ERROR megatron_mtp.a: bad",
    ]


def test_another_rank_is_heard_when_it_is_the_news():
    assert heard("setup_logging(3)" + SPEAK) == ["[rank 3] here", "[rank 3] ERROR megatron_mtp.a: bad"]


def test_level_comes_from_the_environment():
    assert "DEBUG megatron_mtp.a: detail" in heard("setup_logging()" + SPEAK, MEGATRON_MTP_LOG="debug")
    assert heard("setup_logging()" + SPEAK, MEGATRON_MTP_LOG="error") == ["ERROR megatron_mtp.a: bad"]
    assert "MEGATRON_MTP_LOG=LOUD is not a log level" in heard("setup_logging()", MEGATRON_MTP_LOG="loud")[0]


def test_calling_twice_prints_once_and_takes_the_new_rank():
    assert heard("setup_logging(0); setup_logging(1)\nlog.error('bad')") == ["[rank 1] ERROR megatron_mtp.a: bad"]


def test_a_scripts_own_logging_is_left_alone():
    assert heard("logging.basicConfig(format='own %(message)s'); setup_logging(); log.info('news')") == ["own news"]


def test_noise_is_silent_and_other_warnings_are_not():
    code = """
setup_logging()
warnings.warn("Apex is not installed. Falling back to Torch Norm")
warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.")
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
warnings.warn("something new")
"""
    lines = heard(code)
    assert any("something new" in line for line in lines)
    assert not any("Apex" in line or "CUDA" in line for line in lines)


def test_silenced_loggers_still_tell_errors():
    from megatron_mtp.observe.logs import _LOGGERS

    assert all(level <= logging.ERROR for _, level, _ in _LOGGERS)
