"""The table of pairs in docs/numerics.md is what the config checks say, and what it calls exact is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gloo_pool import GlooPool
from tests.numerics.pairs import BASE, BEGIN, DOCUMENT, END, FEATURES, Pair, all_pairs, table
from tests.numerics.runs import Step, assert_same_step, masked_step

EXACT = [pair for pair in all_pairs() if pair.is_run and pair.refusal() is None]
# Of every feature one pair, those that met a fault first; `make test-all` takes them all.
QUICK = {
    ("PP", "frozen trunk"),
    ("CP", "documents"),
    ("TP+SP", "parallel heads"),
    ("EP", "repeated layer"),
    ("VPP", "recompute block"),
}


@pytest.mark.unit
def test_the_document_holds_the_table():
    text = DOCUMENT.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table(), "run python -m tests.numerics.pairs"


class Pools:
    """Pools by size, started when first used, and the one-rank step of each set of features."""

    def __init__(self) -> None:
        self._pools: dict[int, GlooPool] = {}
        self._references: dict[tuple[str, ...], Step] = {}

    def step(self, world_size: int, recipe: str, fields: tuple[str, ...], documents: bool) -> Step:
        if world_size not in self._pools:
            self._pools[world_size] = GlooPool(world_size)
        masks, starts = samples()
        return self._pools[world_size].run(masked_step, recipe, (*BASE, *fields), masks, starts if documents else None)[
            0
        ]

    def reference(self, recipe: str, fields: tuple[str, ...], documents: bool) -> Step:
        key = (recipe, *fields)
        if key not in self._references:
            self._references[key] = self.step(1, recipe, fields, documents)
        return self._references[key]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [4, 32] (full, padded, holes, empty) and document starts [4, 33]."""
    generator = torch.Generator().manual_seed(7)
    masks = torch.ones(4, 32)
    masks[1, 11:] = 0
    masks[2] = (torch.rand(32, generator=generator) < 0.6).float()
    masks[3] = 0
    return masks, torch.rand(4, 33, generator=generator) < 0.15


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


def _parameters() -> list:
    return [
        pytest.param(
            pair, id=f"{pair.left}, {pair.right}", marks=[] if (pair.left, pair.right) in QUICK else [pytest.mark.slow]
        )
        for pair in EXACT
    ]


@pytest.mark.dist
@pytest.mark.parametrize("pair", _parameters())
def test_a_pair_is_exact(pools, pair: Pair):
    """Against one rank without what must not change a number; two features of the model meet at TP+SP."""
    documents = "documents" in (pair.left, pair.right)
    reference = pools.reference(pair.recipe, pair.reference_fields, documents)
    fields, world_size = pair.fields, pair.world_size
    if fields == pair.reference_fields:
        fields, world_size = (*fields, *FEATURES["TP+SP"].fields), 2
    assert_same_step(pools.step(world_size, pair.recipe, fields, documents), reference)


@pytest.mark.unit
def test_every_quick_pair_exists():
    assert {(pair.left, pair.right) for pair in EXACT} >= QUICK
