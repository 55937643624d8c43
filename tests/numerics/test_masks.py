"""The normaliser is the global number of targets: masks with which local counts give wrong gradients on two ranks.

Each mask is one with which Megatron-Core 0.19.2 was measured to be wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.harness.models import SMALL
from tests.harness.runs import Step, assert_same_step, masked_step

pytestmark = pytest.mark.dist

SLOTS = 32
DENSE = (*SMALL, "train.micro_batch_size=1", "train.global_batch_size=4")
LAYOUTS = {
    "cp2": ("model.context_parallel_size=2",),
    "dp2": (),
    "pp2": ("model.pipeline_model_parallel_size=2",),
    "cp2_detached": ("model.context_parallel_size=2", "model.mtp_detach_heads=true"),
}


def masks() -> dict[str, Tensor]:
    """Name -> [4 samples, SLOTS]. Under cp = 2 rank 0 holds slots 0-7 and 24-31, rank 1 slots 8-23."""
    found = {name: torch.zeros(4, SLOTS) for name in ("one_target_at_a_cp_edge", "answers_only", "rank_one_only")}
    found["one_target_at_a_cp_edge"][:, 8] = 1  # depth 1 predicts it from slot 7, on the other rank
    found["answers_only"][:, -5:] = 1
    found["rank_one_only"][:, 10:20] = 1
    found["all"] = torch.ones(4, SLOTS)
    found["prefixes"] = torch.stack([(torch.arange(SLOTS) < length).float() for length in (32, 5, 17, 1)])
    found["empty_micro_batches"] = torch.ones(4, SLOTS)
    found["empty_micro_batches"][1::2] = 0  # under dp = 2 all of a rank
    found["no_target_at_depth_two"] = torch.zeros(4, SLOTS)
    found["no_target_at_depth_two"][0, :2] = 1  # depth 1 has one target, depth 2 none in the batch
    found["none"] = torch.zeros(4, SLOTS)
    return found


@pytest.fixture(scope="module")
def alone(ranks):
    """The step of one rank, by mask and whether heads are detached."""
    steps: dict[tuple[str, bool], Step] = {}
    for name, mask in masks().items():
        for detached in (False, True):
            overrides = (*DENSE, f"model.mtp_detach_heads={detached}")
            steps[name, detached] = ranks(1).run(masked_step, "tiny_dense", overrides, mask)[0]
    return steps


@pytest.mark.parametrize(
    "layout",
    ["cp2", "dp2", pytest.param("pp2", marks=pytest.mark.slow), pytest.param("cp2_detached", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", masks())
def test_layouts_equal_one_rank(ranks, alone, name, layout):
    got = ranks(2).run(masked_step, "tiny_dense", (*DENSE, *LAYOUTS[layout]), masks()[name])[0]
    assert_same_step(got, alone[name, "detached" in layout])


def test_a_depth_without_targets_gives_no_gradient_and_no_nan(alone):
    partial, nothing = alone["no_target_at_depth_two", False], alone["none", False]
    assert partial.counts == [2, 1, 0]
    assert [loss == loss for loss in partial.losses] == [True, True, False]
    assert all(torch.isfinite(gradient).all() for gradient in partial.gradients.values())
    assert all(not gradient.any() for name, gradient in partial.gradients.items() if name.startswith("mtp.layers.1"))
    assert nothing.counts == [0, 0, 0]
    assert not any(gradient.any() for gradient in nothing.gradients.values())
