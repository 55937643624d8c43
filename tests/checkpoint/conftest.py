"""Ranks for all modules of this folder: pools of two and four, made at first use and again after a test broke one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_mtp.device.worker_pool import WorkerPool

TIMEOUT_S, COLLECTIVE_TIMEOUT_S = 300.0, 240.0
"""A step takes milliseconds, but on a busy machine four ranks wait for each other at every message."""


class Ranks:
    """`size` ranks on gloo."""

    def __init__(self, size: int):
        self._size, self._pool = size, None

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """As WorkerPool.run."""
        if self._pool is None or not self._pool.is_open:
            preload = ["tests.gloo_preload"]
            self._pool = WorkerPool(self._size, TIMEOUT_S, preload, collective_timeout_s=COLLECTIVE_TIMEOUT_S)
        return self._pool.run(work, *args)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


@pytest.fixture(scope="package")
def pool() -> Iterator[Ranks]:
    """Two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="package")
def four() -> Iterator[Ranks]:
    """Four ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()
