"""Worker processes that have joined one gloo group and stay alive between calls.

with WorkerPool(2, preload=["megatron_mtp.training.setup"]) as pool:
    assert pool.run(sum_of_ranks, 10) == [11, 11]   # sum_of_ranks is a function of a module
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S, COLLECTIVE_TIMEOUT_S = 120.0, 60.0


class WorkerError(Exception):
    """A worker raised, ended, or did not answer in time. The text holds its traceback; the pool is closed."""


class WorkerPool:
    """`size` processes in one gloo group on the CPU, with the facade over torch.cuda installed.

    Args:
        size: number of processes.
        timeout_s: maximum time of one `run`.
        preload: modules that the fork server imports once, so that a worker starts in a tenth of a second. Only the
            first pool of a process can choose them.
        collective_timeout_s: a collective that waits longer raises.
    """

    def __init__(
        self,
        size: int,
        timeout_s: float = TIMEOUT_S,
        preload: Sequence[str] = (),
        collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ):
        self.size, self.timeout_s, self.is_open = size, timeout_s, True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, store, theirs, collective_timeout_s)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect("start")

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs work(*args) on every rank and returns the results in order of rank.

        Raises:
            WorkerError: a rank raised, ended, or took too long. It ends the pool: other ranks may wait in a collective.
        """
        return self._send("run", work, args)

    def hold(self, make: Callable[..., Any], *args: Any) -> None:
        """Makes make(*args) on every rank and keeps it there for `run_held`."""
        self._send("hold", make, args)

    def run_held(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        """`run` with what each rank holds as the first argument: method(held, *args)."""
        return self._send("run_held", method, args)

    def _send(self, mode: str, work: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self._pipes:
            with suppress(ConnectionError):  # a worker that has ended: `_collect` says which
                pipe.send((mode, work, args))
        return self._collect(work.__qualname__)

    def _collect(self, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(results) < self.size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                missing = [rank for rank in range(self.size) if rank not in results]
                raise WorkerError(f"{what}: no answer from ranks {missing} after {self.timeout_s} s")
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                results[rank] = self._receive(rank, self._pipes[rank], what)
        return [results[rank] for rank in range(self.size)]

    def _receive(self, rank: int, pipe: Connection, what: str) -> Any:
        try:
            is_error, value = pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            code = self._processes[rank].exitcode
            raise WorkerError(f"{what}: the process of rank {rank} ended (exit code {code}), out of memory?") from error
        if is_error:
            self.close()
            raise WorkerError(f"{what} failed on rank {rank}:\n{value}")
        return value

    def close(self) -> None:
        """Ends the processes; may be called twice."""
        self.is_open = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def worker_pools(
    preload: Sequence[str] = (), timeout_s: float = TIMEOUT_S, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> Iterator[Callable[[int], WorkerPool]]:
    """Yields a function from size to pool; the arguments are WorkerPool's.

    Each pool starts at its first use, starts again if a failure ended it, and is closed at the end of the block.
    """
    pools: dict[int, WorkerPool] = {}

    def pool_of(size: int) -> WorkerPool:
        if size not in pools or not pools[size].is_open:
            pools[size] = WorkerPool(size, timeout_s, preload, collective_timeout_s)
        return pools[size]

    try:
        yield pool_of
    finally:
        for pool in pools.values():
            pool.close()


def _serve(rank: int, size: int, store: str, pipe: Connection, collective_timeout_s: float) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    from megatron_mtp.device import cpu_facade

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers
    torch.set_num_threads(1)
    cpu_facade.install("cpu")
    try:
        timeout = timedelta(seconds=collective_timeout_s)
        dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        pipe.send((False, None))
        held = None
        while True:
            mode, work, args = pipe.recv()
            result = work(held, *args) if mode == "run_held" else work(*args)
            if mode == "hold":
                held, result = result, None
            pipe.send((False, result))
    except EOFError:
        return
    except BaseException:
        pipe.send((True, traceback.format_exc()))
