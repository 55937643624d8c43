"""The table of pairs in docs/numerics.md is what the config checks say, and what it calls exact is."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.harness.runs import Step, assert_same_step, masked_step
from tests.numerics.pairs import BASE, BEGIN, DOCUMENT, END, FEATURES, Pair, all_pairs, table

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


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [4, 32] (full, padded, holes, empty) and document starts [4, 33]."""
    generator = torch.Generator().manual_seed(7)
    masks = torch.ones(4, 32)
    masks[1, 11:] = 0
    masks[2] = (torch.rand(32, generator=generator) < 0.6).float()
    masks[3] = 0
    return masks, torch.rand(4, 33, generator=generator) < 0.15


@pytest.fixture(scope="module")
def step(ranks):
    """A step of a recipe with fields; those of one rank are kept, for they are references."""

    def take(world_size: int, recipe: str, fields: tuple[str, ...], documents: bool) -> Step:
        masks, starts = samples()
        return ranks(world_size).run(masked_step, recipe, (*BASE, *fields), masks, starts if documents else None)[0]

    kept = functools.cache(take)
    return lambda world_size, *args: (kept if world_size == 1 else take)(world_size, *args)


def _parameters() -> list:
    return [
        pytest.param(
            pair, id=f"{pair.left}, {pair.right}", marks=[] if (pair.left, pair.right) in QUICK else [pytest.mark.slow]
        )
        for pair in EXACT
    ]


@pytest.mark.dist
@pytest.mark.parametrize("pair", _parameters())
def test_a_pair_is_exact(step, pair: Pair):
    """Against one rank without what must not change a number; two features of the model meet at TP+SP."""
    documents = "documents" in (pair.left, pair.right)
    reference = step(1, pair.recipe, pair.reference_fields, documents)
    fields, world_size = pair.fields, pair.world_size
    if fields == pair.reference_fields:
        fields, world_size = (*fields, *FEATURES["TP+SP"].fields), 2
    assert_same_step(step(world_size, pair.recipe, fields, documents), reference)


@pytest.mark.unit
def test_every_quick_pair_exists():
    assert {(pair.left, pair.right) for pair in EXACT} >= QUICK
