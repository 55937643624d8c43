"""Processor time of a command: the clock on the wall measures what else the machine does."""

from __future__ import annotations

import os
import resource
import subprocess
import sys


def cpu_seconds(*arguments: str) -> float:
    """Processor time of `python ARGUMENTS` with its bytecode cached, the best of three; the command must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def is_quick(*arguments: str) -> bool:
    """Whether `python ARGUMENTS` takes at most eight times as long as importing the command line's library.

    About half a second; the comparison holds on machines of any speed.
    """
    return cpu_seconds(*arguments) < 8 * cpu_seconds("-c", "import typer")
