"""Two pipeline stages against the plain model in fp64: MTP layers with trunk layers on their stage, and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.harness.runs import opened
from tests.model.comparison import assert_same, assert_same_routing
from tests.model.parity import (
    Batches,
    StepResults,
    global_batch,
    plain_model,
    plain_step,
    program_config,
    step_of_chunk,
)
from tests.model.test_parity_one_rank import DENSE, MLA_MOE
from tests.reference.plain_model import PlainConfig

pytestmark = pytest.mark.dist

# Four trunk layers and two depths on two stages: ttt | tmmL. Two trunk layers: tt | mmL.
DEEP = replace(DENSE, num_layers=4)
CASES = {
    "dense": DEEP,
    "dense_tied_repeated": replace(DEEP, tied=True, mtp_repeated=True),
    "parallel_detached_pre_norm": replace(DEEP, mtp_variant="parallel", mtp_detach=True, mtp_hidden="pre_final_norm"),
    "pre_final_norm": replace(DEEP, mtp_hidden="pre_final_norm"),
    "frozen_trunk": replace(DEEP, mtp_freeze_trunk=True),
    "mla_moe": replace(MLA_MOE, num_layers=4, moe_layers=(False, True, True, True)),
    "no_trunk_layer_beside_mtp": DENSE,
    "no_trunk_layer_beside_mtp_tied": replace(MLA_MOE, tied=True),
}


def step_of_stage(plain: PlainConfig, batches: Batches) -> StepResults:
    """On each rank: the step of its stage."""
    with opened(program_config(plain, batches, pp=2)) as run:
        return step_of_chunk(run, plain_model(plain), batches)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_the_plain_model(ranks, name, documents):
    plain, batches = CASES[name], global_batch(documents)
    stages = ranks(2).run(step_of_stage, plain, batches)
    expected = plain_step(plain_model(plain), batches)

    assert_same_routing(by_micro_batch([stage.routing_maps for stage in stages], len(batches)), expected.routing_maps)
    first, last = (stage.gradients for stage in stages)
    for shared in first.keys() & last.keys():
        assert torch.equal(first[shared], last[shared]), f"the copies of {shared} on the two stages differ"
    biases = stages[0].expert_biases | stages[1].expert_biases
    for stage in stages:  # losses and counts are the same on every rank
        assert_same(StepResults(**vars(stage) | {"gradients": first | last, "expert_biases": biases}), expected)


def by_micro_batch(maps_of_stages: list[list[Tensor]], num_microbatches: int) -> list[Tensor]:
    """Each stage's router calls in its own order -> micro-batch by micro-batch, through all stages."""
    per_stage = [len(maps) // num_microbatches for maps in maps_of_stages]
    return [
        maps[index * calls + call]
        for index in range(num_microbatches)
        for maps, calls in zip(maps_of_stages, per_stage, strict=True)
        for call in range(calls)
    ]
