"""The files in configs/ fit the recipes they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp.config.overrides import apply_overrides, apply_yaml
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["demo", "tiny_dense", "tiny_moe", "tiny_mla_moe"]


def overlaid(recipe: str, *names: str, overrides: tuple[str, ...] = ()):
    cfg = get_recipe(recipe)
    for name in names:
        apply_yaml(cfg, CONFIGS / name)
    apply_overrides(cfg, list(overrides))
    return cfg


def test_every_overlay_is_tested():
    assert {path.name for path in CONFIGS.iterdir()} == {"laptop.yaml", "node_8gpu.yaml", "cluster.yaml", "dclm.yaml"}


@pytest.mark.parametrize("recipe", SMALL)
def test_laptop_is_one_process(recipe):
    cfg = overlaid(recipe, "laptop.yaml").finalize(world_size=1)
    assert cfg.precision.dtype == "fp32"


@pytest.mark.parametrize("recipe", [*SMALL, "qwen3_30b_a3b"])
def test_one_node_is_8_processes(recipe):
    cfg = overlaid(recipe, "node_8gpu.yaml").finalize(world_size=8)
    assert cfg.model.pipeline_model_parallel_size == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_cluster_changes_no_model(recipe):
    cfg = overlaid(recipe, "cluster.yaml", overrides=("checkpoint.save=/run", "checkpoint.load=/run"))
    assert cfg.model == get_recipe(recipe).model
    cfg.finalize()


def test_data_overlays_combine_with_hardware_overlays():
    cfg = overlaid("qwen3_30b_a3b", "dclm.yaml", "node_8gpu.yaml").finalize(world_size=8)
    assert len(cfg.dataset.blend[0]) == 10
