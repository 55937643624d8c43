"""Plans that assume software which this trainer lacks: FP8, overlap, graphs, other exchanges; and links of groups."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.machines import find_machine
from megatron_mtp.errors import ConfigError, PlanError
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions, read_assumptions
from megatron_mtp.parallel.planner.cost import estimate_costs
from megatron_mtp.parallel.planner.links import Links
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
MXFP8 = Assumptions(fp8="mxfp8")


def shape_of(recipe: str, devices: int, **model) -> RunShape:
    cfg: ConfigContainer = get_recipe(recipe)
    cfg.model.update(**model)
    return RunShape.of(cfg.finalize(devices), devices)


def links_of(recipe: str, devices: int, assume: Assumptions = NOTHING, machine: str = "h100", **model) -> Links:
    return Links(shape_of(recipe, devices, **model), find_machine(machine), assume)


def test_fp8_makes_layers_faster_but_not_twice_and_leaves_the_head_alone():
    shape, machine = shape_of("llama3_70b", 32), find_machine("b200")
    half, fp8 = estimate_costs(shape, machine), estimate_costs(shape, machine, MXFP8)
    assert 1.2 < half.layer["dense"].total_ms / fp8.layer["dense"].total_ms < 2
    assert fp8.head == half.head


def test_fp8_keeps_less_of_the_activations_and_more_or_fewer_weights():
    shape = shape_of("llama3_70b", 32)
    layout = PipelineLayout.parse("even", shape.cfg.model)
    half, beside, instead = (
        MemoryModel(shape, False, assume).rank(layout, 0)
        for assume in (NOTHING, MXFP8, replace(MXFP8, fp8_parameters=True))
    )
    assert 0.6 < beside.activations / half.activations < 0.95
    assert beside.weights == pytest.approx(half.weights * (2 + 2 * (1 + 1 / 32)) / 2, rel=1e-6)
    assert instead.weights == pytest.approx(half.weights * (1 + 1 / 32), rel=1e-6)
    assert beside.optimizer == half.optimizer


def test_a_device_without_fp8_refuses_it():
    with pytest.raises(ConfigError, match="a100 has no units for it"):
        estimate_costs(shape_of("llama3_8b", 8), find_machine("a100"), MXFP8)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["fp8=fp9"], "must be one of 'none', 'tensorwise'"),
        (["overlap=true"], "Did you mean overlap"),
        (["graphs"], "must be name=value"),
        (["busiest_rank=0.5"], "at least 1"),
        (["overlap_experts=3"], "true or false"),
    ],
)
def test_an_assumption_that_is_not_known_is_named(texts, words):
    with pytest.raises(PlanError, match=words):
        read_assumptions(texts)


def test_assumptions_are_read_and_said_again():
    found = read_assumptions(["fp8=mxfp8", "overlap_experts=true", "busiest_rank=1.5"])
    assert found == Assumptions(fp8="mxfp8", overlap_experts=True, busiest_rank=1.5)
    assert found.words() == "fp8=mxfp8, overlap_experts=true, busiest_rank=1.5"
    assert NOTHING.words() == ""


def test_a_token_goes_once_to_each_node_or_once_to_each_expert():
    """DeepSeek-V3: 8 experts of each token, EP 64 on 8 nodes, at most 4 of 8 groups of experts."""
    each = links_of("deepseek_v3", 1024)
    once = links_of("deepseek_v3", 1024, Assumptions(dispatch="deduplicated"))
    free = links_of(
        "deepseek_v3",
        1024,
        Assumptions(dispatch="deduplicated"),
        moe_router_num_groups=None,
        moe_router_group_topk=None,
    )
    assert each.copies_per_token(8) == 7
    assert free.copies_per_token(8) == pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8)
    assert once.copies_per_token(8) == pytest.approx(4 * (1 - (3 / 4) ** 8) * 7 / 8)
    assert once.exchange(8192.0, 2) < free.exchange(8192.0, 2) < each.exchange(8192.0, 2)


def test_exchanges_within_a_node_or_a_rack_use_its_links():
    near, far = links_of("deepseek_v3", 1024, machine="gb200"), links_of("deepseek_v3", 1024)
    assert near.exchange(8192.0, 2) < far.exchange(8192.0, 2) / 5


def test_overlap_hides_exchanges_and_never_all_of_them():
    shape, machine = shape_of("deepseek_v3", 1024), find_machine("h100")
    machine = replace(machine, host_ms=0.0)  # else Python would be the slower one
    shown = estimate_costs(shape, machine).layer["moe"].total_ms
    hidden = estimate_costs(shape, machine, Assumptions(overlap_experts=True)).layer["moe"].total_ms
    alone = estimate_costs(shape, replace(machine, node_gb_per_s=1e6, network_gb_per_s=1e6)).layer["moe"].total_ms
    assert alone < hidden < shown


def test_python_is_slower_than_small_layers_of_experts_unless_graphs_replay_them():
    shape, machine = shape_of("qwen3_30b_a3b", 8), find_machine("b200")
    plain, attention, whole = (
        estimate_costs(shape, machine, Assumptions(fp8="mxfp8", graphs=graphs)).layer["moe"].total_ms
        for graphs in ("none", "attention", "all")
    )
    assert whole < attention < plain
    assert plain >= 2 * machine.host_ms * machine.host_expert_factor * machine.host_fp8_factor


def test_a_busiest_rank_slows_the_experts():
    shape, machine = shape_of("deepseek_v3", 1024), find_machine("h100")
    even, uneven = (estimate_costs(shape, machine, Assumptions(busiest_rank=factor)) for factor in (1.0, 1.5))
    assert uneven.layer["moe"].forward_ms > 1.2 * even.layer["moe"].forward_ms
    assert uneven.layer["dense"] == even.layer["dense"]


def test_dropped_tokens_cost_nothing():
    machine = find_machine("h100")
    kept = estimate_costs(shape_of("deepseek_v3", 1024), machine)
    dropped = estimate_costs(shape_of("deepseek_v3", 1024, moe_expert_capacity_factor=0.5), machine)
    assert dropped.layer["moe"].forward_ms < 0.8 * kept.layer["moe"].forward_ms


@pytest.mark.parametrize(
    ("tp", "is_swapped", "pipeline", "data"),
    [
        # Eight GPUs in a node; 450 GB/s in it, 50 GB/s for each GPU between nodes.
        (1, False, 50, 400),  # replicas are neighbours: a ring has all eight ports
        (4, False, 50, 100),
        (8, False, 50, 50),
        (1, True, 450, 100),  # four stages and two replicas in each node
        (2, True, 450, 50),
    ],
)
def test_groups_use_the_links_of_their_places(tp, is_swapped, pipeline, data):
    cfg = get_recipe("llama3_70b")
    cfg.model.update(tensor_model_parallel_size=tp, sequence_parallel=tp > 1, context_parallel_size=1)
    cfg.dist.use_tp_pp_dp_mapping = is_swapped
    machine = replace(find_machine("h100"), link_fraction=1.0)
    links = Links(RunShape.of(cfg.finalize(128), 128), machine, NOTHING)
    assert (links.pipeline.gb_per_s, links.data.gb_per_s) == (pipeline, data)


def test_replicas_of_experts_are_further_apart_than_those_of_other_weights():
    """EP 8 fills a node: each replica of an expert is on a node of its own and has one port of the network."""
    links = links_of("mixtral_8x7b", 64)
    assert (links.data.gb_per_s, links.expert_data.gb_per_s) == (400.0, 50.0)


def test_experts_one_after_another_take_longer_than_grouped_ones():
    """Without Transformer Engine; the more experts a rank holds, the more."""
    machine = find_machine("h100")
    times = {
        (ep, backend): estimate_costs(
            shape_of("qwen3_30b_a3b", 16, expert_model_parallel_size=ep, backend=backend), machine
        ).layer["moe"]
        for ep in (4, 1)
        for backend in ("transformer_engine", "torch")
    }
    extra = {ep: times[ep, "torch"].forward_ms - times[ep, "transformer_engine"].forward_ms for ep in (4, 1)}
    assert 0 < extra[4] < extra[1]
