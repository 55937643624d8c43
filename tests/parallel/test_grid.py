"""Stages of ranks equal Megatron's pipeline groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.parallel.grid import RankGrid

pytestmark = pytest.mark.unit

SIZES = st.sampled_from([1, 2, 3])


@settings(max_examples=60, deadline=None)
@given(tp=SIZES, cp=SIZES, pp=SIZES, ep=SIZES, etp=SIZES, dp=st.integers(1, 4), pp_before_dp=st.booleans())
def test_stages_are_megatrons(tp, cp, pp, ep, etp, dp, pp_before_dp):
    from megatron.core.parallel_state import RankGenerator

    world = tp * cp * pp * ep * etp * dp
    order = "tp-cp-ep-pp-dp" if pp_before_dp else "tp-cp-ep-dp-pp"
    sizes = {"world_size": world, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "pp_before_dp": pp_before_dp}
    if pp_before_dp and pp > 1 and tp * cp != etp * ep:
        return  # refused by `finalize`
    grid = RankGrid(**sizes)
    dense = RankGenerator(tp=tp, ep=1, dp=grid.dp_size, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=grid.expert_dp_size, pp=pp, cp=1, order=order)
    for groups in (dense.get_ranks("pp"), expert.get_ranks("pp")):
        assert [[grid.stage(rank) for rank in group] for group in groups] == [list(range(pp))] * (world // pp)


def test_sizes_and_stage_of_one_rank():
    grid = RankGrid(world_size=8, tp=2, pp=2)
    assert (grid.stage(5), RankGrid(world_size=8, tp=2, pp=2, pp_before_dp=True).stage(5)) == (1, 0)
    assert (grid.dp_size, grid.expert_dp_size) == (2, 2)
