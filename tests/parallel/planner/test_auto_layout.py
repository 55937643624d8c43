"""`auto` is the planner's layout: the same in every command, planned again whenever what it depends on changes."""

from __future__ import annotations

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.plan.compare import make_plans
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


def config(recipe: str = "tiny_dense", **model):
    cfg = get_recipe(recipe)
    cfg.dist.device = "cpu"
    cfg.train.global_batch_size = 16
    for name, value in ({"num_layers": 12, "pipeline_model_parallel_size": 4} | model).items():
        setattr(cfg.model, name, value)
    return cfg


def test_a_run_and_the_plan_command_have_one_layout():
    for recipe in ("tiny_dense", "tiny_mimo"):
        planned = make_plans(config(recipe)).chosen.layout
        assert resolve(config(recipe).finalize()).layout == planned


def test_costs_shape_it_where_an_even_split_would_not():
    cfg = config(vocab_size=50_000).finalize()
    chosen, even = resolve(cfg).layout, PipelineLayout.parse("even", cfg.model)
    assert chosen.in_order[-1].count("t") < even.in_order[-1].count("t")


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline_model_parallel_size": 3},
        {"virtual_pipeline_model_parallel_size": 2},
        {"num_layers": 13},
        {"mtp_num_layers": 0},
        {"mtp_num_layers": 3},
    ],
)
def test_it_is_planned_again_when_the_model_or_its_stages_change(change):
    before, cfg = resolve(config().finalize()).layout, config(**change).finalize()
    after = resolve(cfg).layout
    assert after != before
    flat = after.string.replace("|", "")
    assert flat == "E" + "t" * cfg.model.num_layers + "m" * cfg.model.mtp_num_layers + "L"
    assert (after.pp, after.vp) == (
        cfg.model.pipeline_model_parallel_size,
        cfg.model.virtual_pipeline_model_parallel_size,
    )


def test_a_resumed_config_keeps_the_word_and_not_the_layout():
    saved = config().finalize().to_dict()
    assert saved["model"]["pipeline_model_parallel_layout"] == "auto"


def test_hardware_is_a_matter_of_the_config_not_of_the_machine_at_hand():
    assert resolve(config().finalize()).planned.machine.name == "cpu"
    cfg = config()
    cfg.dist.hardware = "a100"
    assert resolve(cfg.finalize()).planned.machine.name == "a100"
    cfg = config()
    cfg.dist.device = "auto"
    assert resolve(cfg.finalize()).planned.machine.name == "h100"
    cfg = config()
    cfg.dist.hardware = "h1000"
    with pytest.raises(ConfigError, match=r"dist.hardware = 'h1000'.*Did you mean h100\?"):
        cfg.finalize()


def test_a_model_that_no_split_fits_gets_the_fastest_and_a_word():
    cfg = config(hidden_size=8192, ffn_hidden_size=32768, num_attention_heads=64, num_query_groups=64).finalize()
    found = resolve(cfg).planned
    assert not found.fits
    assert found.layout.pp == 4


def test_the_mtp_layers_share_a_chunk_with_the_last_layer_if_they_read_its_output():
    cfg = config(mtp_hidden_source="pre_final_norm", mtp_num_layers=4, num_layers=5, vocab_size=50_000).finalize()
    assert any("m" in chunk and "t" in chunk for chunk in resolve(cfg).layout.in_order)
