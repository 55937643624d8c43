"""Worker processes on gloo that stay alive for a whole test module.

@pytest.fixture(scope="module")
def pool():
    with GlooPool(2) as pool:
        yield pool

def test_sum(pool):
    assert pool.run(sum_of_ranks, 10) == [11, 11]   # sum_of_ranks is a function of a module
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

COLLECTIVE_TIMEOUT_S = 60


class GlooPool:
    """`size` processes that have joined one gloo group, with the CPU facade installed.

    Args:
        size: number of processes.
        timeout_s: longest time that one `run` may take.
    """

    def __init__(self, size: int, timeout_s: float = 120.0):
        self.size, self.timeout_s = size, timeout_s
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.gloo_preload"])
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect("start")

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs work(*args) on every rank and returns the results in order of rank.

        An exception on any rank is raised here with that rank's traceback. A run that takes too long, or a rank that
        raised, ends the pool: its other ranks may wait in a collective.
        """
        for pipe in self._pipes:
            pipe.send((work, args))
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
                raise TimeoutError(f"{what}: no answer from ranks {missing} after {self.timeout_s} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                is_error, value = pipe.recv()
                if is_error:
                    self.close()
                    raise AssertionError(f"{what} failed on rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from megatron_mtp.device import cpu_facade

    torch.set_num_threads(1)
    cpu_facade.install("cpu")
    try:
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        pipe.send((False, None))
        while True:
            work, args = pipe.recv()
            pipe.send((False, work(*args)))
    except EOFError:
        return
    except BaseException:
        pipe.send((True, traceback.format_exc()))
