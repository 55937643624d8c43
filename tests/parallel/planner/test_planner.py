"""A layout's chunks take the time of their parts, and a machine derived from the CPU is one."""

from __future__ import annotations

import pytest

from megatron_mtp.config.machines import find_machine
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.auto_layout import make_planner
from megatron_mtp.parallel.planner.cost import layer_times
from megatron_mtp.parallel.planner.part_costs import ZERO
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("depths", "chunks"), [(0, "Et t ttL"), (2, "Ett t tmmL"), (2, "Ett tt mm L"), (1, "E ttt tm L"), (0, "E tttt L")]
)
def test_a_chunk_takes_the_time_of_its_parts(depths, chunks):
    flat = chunks.split()
    cfg = get_recipe("tiny_moe")
    cfg.model.update(num_layers=4, moe_layer_freq=[0, 1, 0, 1], mtp_num_layers=depths, vocab_size=512)
    cfg.model.update(pipeline_model_parallel_size=len(flat))
    planner = make_planner(RunShape.of(cfg.finalize()), find_machine("h100"))
    layout, costs = PipelineLayout.of_chunks(flat, len(flat), 1), planner.costs
    layers = iter(layer_times(costs, planner.shape))
    left = 4
    for stage, symbols in zip(planner.plan(layout).stages, flat, strict=True):
        expected = costs.chunk
        for _ in range(symbols.count("t")):
            expected, left = expected + next(layers), left - 1
            if depths and not left:
                expected = expected + costs.final_norm
        expected = expected + costs.mtp_layer * symbols.count("m")
        expected = expected + (costs.embedding if "E" in symbols else ZERO)
        if "L" in symbols:
            expected = expected + costs.head + costs.mtp_head * depths + (ZERO if depths else costs.final_norm)
        assert stage.chunks[0].forward_ms == pytest.approx(expected.forward_ms, rel=1e-12)
        assert stage.chunks[0].backward_ms == pytest.approx(expected.backward_ms, rel=1e-12)


def test_a_machine_derived_from_the_cpu_is_one():
    assert find_machine({"base": "cpu", "name": "laptop", "memory_gib": 16}).is_cpu
    assert not find_machine({"base": "h100", "memory_gib": 40}).is_cpu
