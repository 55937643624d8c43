"""Measures layouts on pools of workers that live as long as the test session, and keeps the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.verify.cases import Layout
from megatron_mtp.verify.run import worker_pools
from tests.layouts.models import MODELS, batch_spec

if TYPE_CHECKING:
    from megatron_mtp.verify.compare import Difference  # imports megatron, which takes seconds

Change = Callable[[ConfigContainer], None]


class Bench:
    """Runs layouts of the models in models.py.

    Args:
        pool_of: gives the pool of a size.
    """

    def __init__(self, pool_of: Callable):
        self._pool_of = pool_of
        self._references: dict[tuple, object] = {}

    def difference(
        self, model: str, layout: str, mask: str = "holes", *, change: Change | None = None, curve_steps: int = 0
    ) -> Difference:
        """One layout against one rank.

        Args:
            change: alters the config of both.
            curve_steps: optimizer steps to compare too.
        """
        from megatron_mtp.verify.compare import compare

        key = (model, mask, change, curve_steps)
        if key not in self._references:
            self._references[key] = self.measure(model, "", mask, change, curve_steps)
        return compare(self.measure(model, layout, mask, change, curve_steps), self._references[key])

    def measure(self, model: str, layout: str, mask: str, change: Change | None, curve_steps: int):
        """The measurement of one layout."""
        from megatron_mtp.verify.measure import measure

        cfg = MODELS[model]()
        cfg.dataset.reset_attention_mask = mask == "documents"
        if change is not None:
            change(cfg)
        parsed = Layout.parse(layout)
        placed = parsed.apply(cfg)
        pool = self._pool_of(parsed.world_size(placed))
        return pool.run(measure, placed, batch_spec(placed, mask), curve_steps)[0]


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """Pools are started once each, when first used."""
    with worker_pools() as pool_of:
        yield Bench(pool_of)
