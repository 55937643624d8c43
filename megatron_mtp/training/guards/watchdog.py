"""Ends a job that hangs, with the stack of every rank in one report.

A thread on each rank watches how long ago the rank last said what it is doing. When that is too long, it writes the stacks of all threads of its
process into the job's key-value store, which a hung collective does not block; ranks that wait in the same collective do so at about the
same time. The lowest of them that can speak prints all stacks, names the ranks that are behind or silent, and every rank ends.
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
COLLECT_S = 5.0
"""Ranks have this long to hand in their stacks."""
REPORT_S = 2.0
"""Other ranks stay for this long, so that none is taken for the first to fail while the report is written."""
HURRIED_S, HURRIED_FACTOR = 5.0, 3.0
"""After SIGTERM a rank may be silent for so long, or so many times its longest silence before."""
FROZEN_S = 30.0
"""If not even this thread can run (a C extension that keeps the interpreter), the process is ended so much later, from C."""


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a hung rank says of itself.

    Args:
        beats: signs of life since the start; ranks of one job count in step.
        silent_s: seconds since the last one.
    """

    rank: int
    host: str
    doing: str
    beats: int
    silent_s: float
    stack: str


class Watchdog:
    """Watches this rank. It is on while it is entered.

    Args:
        timeout_s: longest time between two beats; 0: nothing is watched.
        store: of the job; None: taken from the environment when it is entered, and where there is none, every rank speaks for itself.
    """

    def __init__(self, timeout_s: float, rank: int = 0, world_size: int = 1, store: Store | None = None):
        self.timeout_s, self._rank, self._world_size, self._store = timeout_s, rank, world_size, store
        self._prefix = f"megatron_mtp/hung/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._doing, self._beats, self._last = "starting", 0, time.monotonic()
        self._longest_s = 0.0
        self._is_hurried = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """A sign of life: what this rank does next."""
        self._longest_s = max(self._longest_s, time.monotonic() - self._last)
        self._doing, self._beats, self._last = doing, self._beats + 1, time.monotonic()

    def hurry(self) -> None:
        """This rank was asked to end. A launcher does that too when another rank has died: then this one may wait for it in a collective,
        and should not use up its time, so it gets a few times as long as it ever was silent."""
        self._is_hurried = True

    def calm(self) -> None:
        """All ranks are there and agree on what to do; a checkpoint may take its time."""
        self._is_hurried = False

    @property
    def limit_s(self) -> float:
        """Longest silence that is borne at this moment."""
        if not self._is_hurried:
            return self.timeout_s
        return min(self.timeout_s, max(HURRIED_S, HURRIED_FACTOR * self._longest_s))

    def around(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """A forward step that is a sign of life."""

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
            with suppress(AttributeError, ValueError, OSError):  # stderr may be something without a descriptor
                faulthandler.dump_traceback_later(self.timeout_s + COLLECT_S + FROZEN_S, exit=True, file=sys.__stderr__)
            # While training goes on nobody asks the store anything.
            if silent_s > self.limit_s or (silent_s > self.timeout_s / 2 and self._is_asked()):
                self._end(silent_s)

    def _is_asked(self) -> bool:
        """Whether another rank has given up already."""
        with suppress(Exception):
            return self._store is not None and self._store.check([f"{self._prefix}/any"])
        return False

    def _end(self, silent_s: float) -> None:
        own = Testimony(self._rank, socket.gethostname(), self._doing, self._beats, round(silent_s, 1), stacks())
        everyone = self._collect(own)
        if everyone[0].rank == self._rank:
            text = report(everyone, self._world_size, self.limit_s)
            if not Failure(self._rank, text, "crash").write():
                print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(REPORT_S)
            Failure(self._rank, f"rank {self._rank}: ended by the watchdog; another rank reports why", "echo").write()
        os._exit(EXIT_CODE)

    def _collect(self, own: Testimony) -> list[Testimony]:
        """What all ranks that can speak say, in order of rank; this rank's own if the store is lost."""
        found = {self._rank: own}
        with suppress(Exception):
            self._store.set(f"{self._prefix}/{self._rank}", json.dumps(asdict(own)))
            self._store.set(f"{self._prefix}/any", "1")
            deadline = time.monotonic() + COLLECT_S
            while len(found) < self._world_size and time.monotonic() < deadline:
                for rank in set(range(self._world_size)) - set(found):
                    if self._store.check([f"{self._prefix}/{rank}"]):
                        found[rank] = Testimony(**json.loads(self._store.get(f"{self._prefix}/{rank}")))
                time.sleep(0.1)
        return [found[rank] for rank in sorted(found)]


def job_store() -> Store | None:
    """A connection of its own to the store that torchrun or rank 0 serves; None where there is none."""
    if "MASTER_PORT" not in os.environ:
        return None
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=COLLECT_S))
    except Exception as error:  # a watchdog that cannot start must not end a sound run
        logger.warning("the watchdog has no store (%s): each rank will report its own stack only", error)
        return None


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def report(everyone: list[Testimony], world_size: int, timeout_s: float) -> str:
    """The text for the log: who is behind, who is silent, and every stack."""
    lines = [f"megatron-mtp: no progress for {timeout_s:g} s (dist.watchdog_s): the job hangs and is ended."]
    silent = sorted(set(range(world_size)) - {one.rank for one in everyone})
    if silent:
        lines.append(f"ranks that said nothing, dead or frozen: {', '.join(map(str, silent))}")
    furthest = max(one.beats for one in everyone)
    behind = [one for one in everyone if one.beats < furthest]
    lines += [f"behind the others: rank {one.rank} on {one.host}, at: {one.doing}" for one in behind]
    if not silent and not behind:
        lines.append("no rank is behind: all wait at the same place.")
    for one in everyone:
        lines.append(f"---- rank {one.rank} on {one.host}, silent for {one.silent_s} s, at: {one.doing}\n{one.stack}")
    return "\n".join(lines)
