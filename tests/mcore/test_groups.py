"""Groups of a layout."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_mtp.mcore import recompute
from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel

pytestmark = pytest.mark.dist

SIZES = {"tp": 2, "pp": 1, "vp": None, "cp": 1, "ep": 1, "etp": 1}


def groups_of_two_layouts() -> tuple[int, bool]:
    """Number of different groups of two ranks in two layouts, and whether the patch of a layout is gone after it."""
    from megatron.core import tensor_parallel

    seen, make = set(), dist.new_group
    for _ in range(2):
        groups = init_model_parallel(**SIZES, embedding_stages=[0])
        try:
            seen |= {group for group in (groups.tp, groups.mp, groups.tp_cp) if group.size() == 2}
            assert recompute.HAVE_TE or tensor_parallel.CheckpointWithoutOutput is recompute.CheckpointWithoutFP8
        finally:
            destroy_model_parallel()
    restored = tensor_parallel.CheckpointWithoutOutput is recompute.CheckpointWithoutOutput
    return len(seen), restored and dist.new_group is make


def test_gloo_groups_over_the_same_ranks_are_one(ranks):
    assert ranks(2).run(groups_of_two_layouts) == [(1, True)] * 2
