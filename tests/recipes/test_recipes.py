"""Recipes: found by name, without importing each other's modules, and like what they claim to be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_mtp.errors import ConfigError, UnsupportedError
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", RECIPES)
def test_each_call_gives_a_fresh_config_with_mtp(name):
    first, second = get_recipe(name), get_recipe(name)
    assert first == second
    first.model.num_layers += 1
    assert first != second
    assert second.finalize().model.mtp_num_layers >= 1


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean deepseek_v3"):
        get_recipe("deepseekv3")


def test_a_model_that_is_not_built_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"nemotron3_super: a HybridModel .*docs/decisions.md"):
        get_recipe("nemotron3_super")


def test_listing_imports_no_recipe_module():
    code = (
        "import sys, megatron_mtp.recipes; "
        "print([m for m in sys.modules if m.startswith('megatron_mtp.recipes.')], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[] False"


def test_bridge_import_path():
    from megatron_mtp.recipes.qwen.qwen3_moe import qwen3_30b_a3b_pretrain_config

    assert qwen3_30b_a3b_pretrain_config() == get_recipe("qwen3_30b_a3b")


def test_deepseek_v3_follows_its_report():
    cfg = get_recipe("deepseek_v3").finalize(world_size=1024)
    assert cfg.train.train_tokens == 148 * 10**11
    assert cfg.scheduler.lr_decay_tokens - cfg.scheduler.lr_wsd_decay_tokens == 10**13
    assert sum(cfg.model.moe_layer_freq) == 58
