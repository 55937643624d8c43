"""Local ranks for `--nproc`: starts them, ends all when one fails, and reports why the first one failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_mtp.observe.failure_file import FAILURE_DIR, Failure

POLL_S = 0.05
SETTLE_S = 3.0
"""After a failure the other ranks get this long to fail and report: the first cause may be theirs."""
TERM_S = 10.0
"""Time from SIGTERM to SIGKILL."""
TAIL_LINES = 30
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 130


@dataclass(slots=True)
class Rank:
    """One started process."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    ended_at: float | None = None
    was_ended_by_us: bool = False
    failure: Failure | None = None


def run_ranks(command: list[str], num_ranks: int, preempted_code: int = 3) -> int:
    """Runs `command` as `num_ranks` local ranks with torchrun's environment variables.

    Rank 0 has the terminal; the output of the others is shown only if they die without a reason.

    Args:
        preempted_code: exit code of a rank that left on SIGTERM with a checkpoint, which is no failure.

    Returns:
        0, 2 for a mistake of the user, `preempted_code`, or the exit code of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-mtp-") as folder, reserved_port() as port:
        ranks = [_start(command, rank, num_ranks, Path(folder), port) for rank in range(num_ranks)]
        interrupts: list[int] = []
        handlers = {number: signal.signal(number, _forwarder(ranks, interrupts)) for number in FORWARDED}
        try:
            _wait(ranks, interrupts, (None, 0, preempted_code))
        finally:
            _end(ranks)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return INTERRUPTED if interrupts else _report(ranks, Path(folder), preempted_code)


def _start(command: list[str], rank: int, num_ranks: int, folder: Path, port: int) -> Rank:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        FAILURE_DIR: str(folder),
    }
    log = folder / f"rank{rank}.log"
    if rank == 0:
        return Rank(rank, subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL), log)
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    return Rank(rank, process, log)


def _wait(ranks: list[Rank], interrupts: list[int], healthy: tuple[int | None, ...]) -> None:
    """Waits for all ranks to end; after a failure or Ctrl-C, for SETTLE_S at most."""
    failed_at = None
    while any(rank.process.poll() is None for rank in ranks):
        now = time.monotonic()
        _note_ends(ranks)
        if failed_at is None and (interrupts or any(rank.process.poll() not in healthy for rank in ranks)):
            failed_at = now
        if failed_at is not None and now - failed_at > SETTLE_S:
            return
        time.sleep(POLL_S)
    _note_ends(ranks)


def _note_ends(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.ended_at is None and rank.process.poll() is not None:
            rank.ended_at = time.time()


def _end(ranks: list[Rank]) -> None:
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.was_ended_by_us = True
        rank.process.terminate()
    deadline = time.monotonic() + TERM_S
    for rank in running:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def _forwarder(ranks: list[Rank], interrupts: list[int]) -> Callable[[int, object], None]:
    """Forwards SIGTERM and SIGUSR1. Ctrl-C is only noted: the terminal sends it to the ranks too."""

    def forward(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
            return
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    return forward


def _report(ranks: list[Rank], folder: Path, preempted_code: int) -> int:
    """Prints the first cause and returns the exit code."""
    failed = [rank for rank in ranks if rank.process.returncode not in (0, preempted_code) and not rank.was_ended_by_us]
    if not failed:
        return max(rank.process.returncode for rank in ranks if not rank.was_ended_by_us)
    for rank in failed:
        rank.failure = Failure.read(folder, rank.rank)
    first = min(failed, key=_order)
    code = first.process.returncode
    if first.failure and first.failure.kind == "mistake":
        print(first.failure.text, file=sys.stderr, flush=True)
        return code
    text = first.failure.text if first.failure else tail(first.log)
    print(f"megatron-mtp: rank {first.rank} failed first: {_end_in_words(code)}", file=sys.stderr)
    print(text or "It left no message.", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _order(rank: Rank) -> tuple[int, float, int]:
    """Ranks killed from outside first, then mistakes, crashes and consequences of another rank's end; each by time."""
    if rank.failure is None:
        return 0, rank.ended_at or 0.0, rank.rank
    return 1 + ("mistake", "crash", "echo").index(rank.failure.kind), rank.failure.time, rank.rank


def _end_in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"


def tail(log: Path) -> str:
    """The last lines of a file; empty if it cannot be read."""
    with suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return ""


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that only a socket with SO_REUSEADDR, such as a store's of torch, can listen on while the block runs.

    Ranks import for seconds before rank 0 listens. A port that was merely free before may by then be the own end of
    some connection on a busy machine.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))  # bound and not listening: the kernel gives it to nobody
        yield holder.getsockname()[1]
