"""Ranks on gloo for every test of a session.

def test_sum(ranks):
    assert ranks(2).run(sum_of_ranks, 10) == [11, 11]   # sum_of_ranks is a function of a module
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest

from megatron_mtp.device.worker_pool import WorkerPool, worker_pools

Ranks = Callable[[int], WorkerPool]

TIMEOUT_S, COLLECTIVE_TIMEOUT_S = 280.0, 240.0
"""A step takes milliseconds, but on a busy machine four ranks wait for each other at every message."""
MAX_THREADS = 64
"""A gloo group polls with two threads while something refers to it; a rank with a thousand starves the machine."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool of a size: started at its first use, again after a test that broke it, and shared by all modules."""
    with worker_pools(["tests.harness.preload"], TIMEOUT_S, COLLECTIVE_TIMEOUT_S) as pool_of:
        yield pool_of
        threads = max((worker.num_threads() for worker in psutil.Process().children(recursive=True)), default=0)
        assert threads <= MAX_THREADS, f"a rank holds {threads} threads: a test makes groups past init_model_parallel"
