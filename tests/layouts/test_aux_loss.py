"""`aux_loss` balances within a micro-batch: the same at every layout, but not at every micro-batch size."""

from __future__ import annotations

import pytest

from megatron_mtp.config import ConfigContainer

pytestmark = pytest.mark.dist
LAYOUTS = ("pp=2", "cp=2", "tp=2,sp=1,ep=2,etp=1", "dp=2", "dp=2,distopt=1,overlap=1", "pp=2,ep=2")
FAST = ("tp=2,sp=1,ep=2,etp=1", "dp=2")


def with_aux_loss(cfg: ConfigContainer) -> None:
    cfg.model.moe_router_load_balancing_type = "aux_loss"


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[] if layout in FAST else [pytest.mark.slow]) for layout in LAYOUTS]
)
def test_a_layout_computes_what_one_rank_computes(compared, layout):
    assert compared("moe", layout, "padded", with_aux_loss).faults() == []


def test_the_micro_batch_size_changes_the_balancing_loss_and_no_other(compared):
    difference = compared("moe", "mbs=1", "padded", with_aux_loss)
    assert 1e-2 < difference.router["load_balancing_loss"] < 0.2
    assert difference.router["z_loss"] < 1e-6
    assert max(difference.losses) < 1e-6
    assert "router" in difference.gradient_name
