"""A layout's chunks take the time of their parts, and a machine derived from the CPU is one."""

from __future__ import annotations

import pytest

from megatron_mtp.config.machines import find_machine
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.auto_layout import make_planner
from megatron_mtp.parallel.planner.cost import layer_times
from megatron_mtp.parallel.planner.part_costs import ZERO
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
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


@pytest.mark.parametrize("modules", [None, ["mlp", "moe"]])
@pytest.mark.parametrize("ep", [1, 4])
def test_a_dense_mtp_layer_is_planned_by_its_own_width(ep, modules):
    """As the MTP layer of a model whose dense layers have that width and whose last layer is dense."""
    planned = []
    for fields in (
        {"ffn_hidden_size": 192, "mtp_layer_mlp": "dense", "mtp_ffn_hidden_size": 80},
        {"ffn_hidden_size": 80, "moe_layer_freq": [1, 1, 1, 0]},
        {"ffn_hidden_size": 192},
    ):
        cfg = get_recipe("tiny_moe")
        cfg.model.update(vocab_size=512, expert_model_parallel_size=ep, tensor_model_parallel_size=2, **fields)
        cfg.model.sequence_parallel = True
        if modules:
            cfg.model.update(recompute_granularity="selective", recompute_modules=modules)
        shape = RunShape.of(cfg.finalize())
        memory = MemoryModel(shape)
        costs = make_planner(shape, find_machine("h100")).costs
        planned.append((costs.mtp_layer, memory.parts.mtp_layer(), memory.parts.transient("m", ())))
    dense, expected, experts = planned
    assert dense == expected
    assert dense[0].total_ms < experts[0].total_ms
    assert dense[1] < experts[1]


def test_a_machine_derived_from_the_cpu_is_one():
    assert find_machine({"base": "cpu", "name": "laptop", "memory_gib": 16}).is_cpu
    assert not find_machine({"base": "h100", "memory_gib": 40}).is_cpu
