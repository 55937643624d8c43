"""One pool of two ranks for all modules of this folder; a new one after a test that broke it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gloo_pool import GlooPool


@pytest.fixture(scope="package")
def shared() -> Iterator[dict[str, GlooPool]]:
    """Holds the pool."""
    pools: dict[str, GlooPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def pool(shared: dict[str, GlooPool]) -> GlooPool:
    """Two ranks on gloo."""
    if "pool" not in shared or not shared["pool"].is_open:
        shared["pool"] = GlooPool(2)
    return shared["pool"]
