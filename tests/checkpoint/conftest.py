"""Pools of two and of four ranks for all modules of this folder; a new one after a test that broke it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gloo_pool import GlooPool


@pytest.fixture(scope="package")
def pools() -> Iterator[dict[int, GlooPool]]:
    """Holds the pools, by size."""
    pools: dict[int, GlooPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def pool(pools: dict[int, GlooPool]) -> GlooPool:
    """Two ranks on gloo."""
    return _open(pools, 2)


@pytest.fixture(scope="module")
def four(pools: dict[int, GlooPool]) -> GlooPool:
    """Four ranks on gloo."""
    return _open(pools, 4)


def _open(pools: dict[int, GlooPool], size: int) -> GlooPool:
    if size not in pools or not pools[size].is_open:
        pools[size] = GlooPool(size)
    return pools[size]
