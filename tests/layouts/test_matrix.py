"""Every layout computes what one rank computes with any mask: loss of every depth, counts, routing, every gradient.

megatron_mtp/verify/compare.py holds the tolerances; no pair of the matrix needs larger ones.
"""

from __future__ import annotations

import pytest

from megatron_mtp.verify.batches import MASKS
from tests.layouts.matrix import LAYOUTS, all_pairs, fast_pairs

pytestmark = pytest.mark.dist

FAST = fast_pairs()


@pytest.mark.parametrize(
    ("model", "layout", "mask"),
    [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow]) for pair in all_pairs()],
)
def test_a_layout_computes_what_one_rank_computes(compared, model, layout, mask):
    assert compared(model, layout, mask).faults() == []


def test_the_fast_part_holds_every_mask_and_layout():
    for model in ("dense", "mla_moe"):
        assert {mask for name, _, mask in FAST if name == model} == set(MASKS)
    assert {layout for _, layout, _ in FAST} | {"tp=2,sp=1,pp=2,dp=2"} == {x for xs in LAYOUTS.values() for x in xs}
