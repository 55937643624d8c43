"""The exact size of every recipe's model is that of the family's class in transformers, built on meta tensors from our
config.json.
"""

from __future__ import annotations

import pytest

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_config import family_of, hf_config_dict
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")

# MiMo has no class in transformers; the report's trunk is Qwen2's.
CLASSES = {"mimo": "qwen2"}


def unpadded(name: str) -> ModelConfig:
    """The recipe's model on one rank, without padding of the vocabulary."""
    cfg = get_recipe(name)
    for field in ("tensor", "pipeline", "context", "expert"):
        size = f"{field}_parallel_size" if field == "context" else f"{field}_model_parallel_size"
        setattr(cfg.model, size, 1)
    cfg.model.virtual_pipeline_model_parallel_size = None
    cfg.model.pipeline_model_parallel_layout = "auto"
    cfg.model.make_vocab_size_divisible_by = 1
    return cfg.finalize().model


def theirs(model: ModelConfig) -> torch.nn.Module:
    values = hf_config_dict(model)
    model_type = values.pop("model_type")
    config = transformers.AutoConfig.for_model(CLASSES.get(model_type, model_type), **values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def size(module: torch.nn.Module) -> int:
    return sum({id(p): p.numel() for p in module.parameters()}.values())


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("tiny_moe", "tiny_mla_moe")])
def test_parameters(name):
    model = unpadded(name)
    count, built = count_parameters(model), theirs(model)
    assert count.main == size(built)
    # An MTP layer: two norms of its inputs, the projection of both, a layer of the last kind, a norm.
    h, layers = model.hidden_size, Depths.of(model).distinct
    assert count.mtp == layers * (size(built.model.layers[-1]) + 2 * h * h + 3 * h)
    if model.num_moe_experts is None:
        assert count.main_active == count.main
    else:
        experts = [size(module) for name, module in built.named_modules() if name.endswith(".mlp.experts")]
        idle = sum(experts) // model.num_moe_experts * (model.num_moe_experts - model.moe_router_topk)
        assert count.main_active == count.main - idle


def test_every_family_has_a_recipe():
    from megatron_mtp.convert.hf_families import FAMILIES

    found = {family_of(get_recipe(name).finalize().model) for name in RECIPES if not name.startswith("tiny_")}
    assert found == set(FAMILIES)
