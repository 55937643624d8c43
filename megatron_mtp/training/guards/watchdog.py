"""Ends a job that hangs, with the stack of every rank in one report.

A thread on each rank checks the age of the rank's last heartbeat. When the heartbeat times out, the thread writes the
stacks of all threads of its process into the job's key-value store, which a hung collective does not block. Ranks that
wait in the same collective time out at about the same time. The lowest rank that can still run prints all stacks and
names the ranks that are behind or missing; then every rank ends. The store is asked in another thread: where rank 0
serves it and is frozen, it takes a question and never answers.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore

from megatron_mtp.observe.failure_file import Failure

logger = logging.getLogger(__name__)

EXIT_CODE = 5
ASK_S = 1.0
"""Time for the store to answer one question."""
COLLECT_S = 5.0
"""Time for all ranks to write their stacks."""
REPORT_S = 2.0
"""The other ranks wait this long before they end, so that the launcher does not blame one of them for the failure."""
SHORT_TIMEOUT_S, SHORT_TIMEOUT_FACTOR = 5.0, 3.0
"""After SIGTERM the timeout is this many seconds, or this many times the longest gap between two heartbeats so far."""
FROZEN_S = 30.0
"""If this thread cannot run (a C extension holds the GIL), faulthandler ends the process this much later, from C."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """State of a hung rank.

    Attributes:
        doing: what the rank announced with its last heartbeat.
        beats: heartbeats since the start; all ranks of a job count the same ones.
        silent_s: seconds since the last heartbeat.
        stack: stacks of all threads.
    """

    rank: int
    host: str
    doing: str
    beats: int
    silent_s: float
    stack: str


class Watchdog:
    """Watches this rank while it is entered.

    Args:
        timeout_s: maximum time between two heartbeats; 0: off.
        store: key-value store of the job; None: found through the environment on entry. Without one, each rank reports
            alone.
    """

    def __init__(self, timeout_s: float, rank: int = 0, world_size: int = 1, store: Store | None = None):
        self.timeout_s, self._rank, self._world_size, self._store = timeout_s, rank, world_size, store
        self._prefix = f"megatron_mtp/hung/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._doing, self._beats, self._last = "starting", 0, time.monotonic()
        self._longest_s = 0.0
        self._is_short = False
        self._closed = threading.Event()
        self._asking: threading.Thread | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """A heartbeat: what this rank does next."""
        self._longest_s = max(self._longest_s, time.monotonic() - self._last)
        self._doing, self._beats, self._last = doing, self._beats + 1, time.monotonic()

    def shorten_timeout(self) -> None:
        """Called after SIGTERM. A launcher sends it too when another rank has died: this rank may then wait in a
        collective for a rank that never comes, and should not use up the grace period."""
        self._is_short = True

    def restore_timeout(self) -> None:
        """Called when all ranks have agreed on what to do next: a checkpoint may take as long as it needs."""
        self._is_short = False

    @property
    def limit_s(self) -> float:
        """Maximum time without a heartbeat, at this moment."""
        if not self._is_short:
            return self.timeout_s
        return min(self.timeout_s, max(SHORT_TIMEOUT_S, SHORT_TIMEOUT_FACTOR * self._longest_s))

    def around(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_step` with a heartbeat before each micro-batch."""

        def beating(*arguments: Any) -> Any:
            self.beat("a micro-batch")
            return forward_step(*arguments)

        return beating

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            if self._store is None and self._world_size > 1:
                self._store = job_store()
            self.beat("starting")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause_s = min(1.0, self.timeout_s / 10)
        while not self._closed.wait(pause_s):
            silent_s = time.monotonic() - self._last
            with suppress(AttributeError, ValueError, OSError):  # stderr may be None, or have no file descriptor
                stderr = sys.__stderr__.fileno()  # type: ignore[union-attr]  # None is suppressed
                faulthandler.dump_traceback_later(self.timeout_s + COLLECT_S + FROZEN_S, exit=True, file=stderr)
            # A healthy rank never queries the store.
            if silent_s > self.limit_s or (silent_s > self.timeout_s / 2 and self._is_asked()):
                self._end(silent_s)

    def _is_asked(self) -> bool:
        """Whether another rank has timed out already."""
        store = self._store
        return store is not None and bool(self._ask(lambda: store.check([f"{self._prefix}/any"]), ASK_S))

    def _ask[T](self, question: Callable[[], T], timeout_s: float) -> T | None:
        """The answer of the store; None if there is none in time. An earlier question is waited for first."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(Exception):  # the server is gone
                answers.append(question())

        if self._asking is not None:
            self._asking.join(timeout_s)
            if self._asking.is_alive():
                return None
        self._asking = threading.Thread(target=ask, name="watchdog-store", daemon=True)
        self._asking.start()
        self._asking.join(timeout_s)
        return answers[0] if answers else None

    def _end(self, silent_s: float) -> None:
        own = RankReport(self._rank, socket.gethostname(), self._doing, self._beats, round(silent_s, 1), stacks())
        found = {self._rank: own}
        has_answer = self._store is not None and self._ask(lambda: self._collect(found), COLLECT_S + ASK_S)
        everyone = [one for _, one in sorted(found.copy().items())]
        if everyone[0].rank == self._rank:
            text = report(everyone, self._world_size, self.limit_s, has_store=bool(has_answer))
            if not Failure(self._rank, text, "crash").write():
                print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(REPORT_S)
            text = f"rank {self._rank}: ended by the watchdog; another rank reports why"
            Failure(self._rank, text, "echo").write()
        os._exit(EXIT_CODE)

    def _collect(self, found: dict[int, RankReport]) -> bool:
        """Adds the reports of the ranks that can still write one to this rank's own. True: the store answered."""
        store = self._store
        assert store is not None, "nobody to ask"
        store.set(f"{self._prefix}/{self._rank}", json.dumps(asdict(found[self._rank])))
        store.set(f"{self._prefix}/any", "1")
        deadline = time.monotonic() + COLLECT_S
        while len(found) < self._world_size and time.monotonic() < deadline:
            for rank in set(range(self._world_size)) - set(found):
                if store.check([f"{self._prefix}/{rank}"]):
                    found[rank] = RankReport(**json.loads(store.get(f"{self._prefix}/{rank}")))
            time.sleep(0.1)
        return True


def job_store() -> Store | None:
    """A separate connection to the store that torchrun or rank 0 serves; None where there is none."""
    if "MASTER_PORT" not in os.environ:
        return None
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=COLLECT_S))
    except Exception as error:  # a watchdog that cannot start must not end a healthy run
        logger.warning("the watchdog has no store (%s): each rank will report its own stack only", error)
        return None


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def report(everyone: list[RankReport], world_size: int, timeout_s: float, *, has_store: bool = True) -> str:
    """The text for the log: ranks that are missing or behind, and every stack.

    Args:
        has_store: whether the store answered; without it, a rank knows nothing of the others.
    """
    lines = [f"megatron-mtp: no progress for {timeout_s:g} s (dist.watchdog_s): the job hangs and is ended."]
    silent = sorted(set(range(world_size)) - {one.rank for one in everyone})
    if silent and has_store:
        lines.append(f"ranks without a report, dead or frozen: {', '.join(map(str, silent))}")
    elif silent:
        lines.append(
            "the job's store does not answer: what serves it, rank 0 or torchrun's agent, is dead or frozen. Every "
            "other rank reports alone."
        )
    furthest = max(one.beats for one in everyone)
    behind = [one for one in everyone if one.beats < furthest]
    lines += [f"behind the others: rank {one.rank} on {one.host}, at: {one.doing}" for one in behind]
    if not silent and not behind:
        lines.append("no rank is behind: all wait at the same place.")
    for one in everyone:
        lines.append(
            f"---- rank {one.rank} on {one.host}, no heartbeat for {one.silent_s} s, at: {one.doing}\n{one.stack}"
        )
    return "\n".join(lines)
