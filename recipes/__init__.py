"""Named runs. A recipe is a function that returns a ConfigContainer; a variant calls its parent and changes fields.

Importing this package imports no recipe: the command line lists names in milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, UnsupportedError, nearest

# name on the command line -> "module under megatron_mtp.recipes:function"
RECIPES: dict[str, str] = {
    "demo": "demo:demo_pretrain_config",
    "mtp_finetune": "mtp_finetune:mtp_finetune_config",
    "tiny_dense": "tiny:tiny_dense_pretrain_config",
    "tiny_moe": "tiny:tiny_moe_pretrain_config",
    "tiny_mla_moe": "tiny:tiny_mla_moe_pretrain_config",
    "tiny_llama": "tiny:tiny_llama_pretrain_config",
    "tiny_mimo": "tiny:tiny_mimo_pretrain_config",
    "tiny_mixtral": "tiny:tiny_mixtral_pretrain_config",
    "tiny_glm45": "tiny:tiny_glm45_pretrain_config",
    "tiny_deepseek_v2": "tiny:tiny_deepseek_v2_pretrain_config",
    "tiny_qwen3_next": "tiny:tiny_qwen3_next_pretrain_config",
    "smollm2_135m": "llama.smollm2:smollm2_135m_pretrain_config",
    "llama3_8b": "llama.llama3:llama3_8b_pretrain_config",
    "llama3_70b": "llama.llama3:llama3_70b_pretrain_config",
    "qwen3_600m": "qwen.qwen3:qwen3_600m_pretrain_config",
    "qwen3_1p7b": "qwen.qwen3:qwen3_1p7b_pretrain_config",
    "qwen3_4b": "qwen.qwen3:qwen3_4b_pretrain_config",
    "qwen3_8b": "qwen.qwen3:qwen3_8b_pretrain_config",
    "qwen3_14b": "qwen.qwen3:qwen3_14b_pretrain_config",
    "qwen3_32b": "qwen.qwen3:qwen3_32b_pretrain_config",
    "qwen3_30b_a3b": "qwen.qwen3_moe:qwen3_30b_a3b_pretrain_config",
    "qwen3_235b_a22b": "qwen.qwen3_moe:qwen3_235b_a22b_pretrain_config",
    "qwen3_next_80b_a3b": "qwen.qwen3_next:qwen3_next_80b_a3b_pretrain_config",
    "mimo_7b": "mimo.mimo7b:mimo_7b_pretrain_config",
    "mixtral_8x7b": "mistral.mixtral:mixtral_8x7b_pretrain_config",
    "glm45": "glm.glm45:glm45_pretrain_config",
    "glm45_air": "glm.glm45:glm45_air_pretrain_config",
    "deepseek_v2_lite": "deepseek.deepseek_v2:deepseek_v2_lite_pretrain_config",
    "deepseek_v3": "deepseek.deepseek_v3:deepseek_v3_pretrain_config",
    "deepseek_v3_whole": "deepseek.deepseek_v3:deepseek_v3_whole_pretrain_config",
    "moonlight_16b_a3b": "moonshot.moonlight:moonlight_16b_a3b_pretrain_config",
    "kimi_k2": "moonshot.moonlight:kimi_k2_pretrain_config",
}

# name -> why there is no such recipe, for models that people look for
REFUSED: dict[str, str] = {
    "nemotron3_super": "a HybridModel computes the MTP losses inside its own forward pass, has no MTP stage, and its "
    "Mamba layers run on GPUs only, so no layout could be compared with one rank (docs/decisions.md, "
    "'Model families')",
}


def get_recipe(name: str) -> ConfigContainer:
    """Returns a fresh, unfinalized config of a recipe.

    Args:
        name: one of RECIPES, or one's own: `module:function` or `path/file.py:function`.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest ones. Or the code of one's own fails.
    """
    return recipe_function(name)()


def recipe_function(name: str) -> Callable[[], ConfigContainer]:
    """The function of a recipe; raises as `get_recipe`."""
    if ":" in name or name.endswith(".py"):
        from megatron_mtp.recipes.own import own_recipe

        return own_recipe(name)
    if name in REFUSED:
        raise UnsupportedError(f"recipe {name}: {REFUSED[name]}. Known recipes: {', '.join(RECIPES)}.")
    if name not in RECIPES:
        meant = nearest(name, RECIPES, count=2)
        raise ConfigError(f"There is no recipe {name!r}.{meant} Known recipes: {', '.join(RECIPES)}.")
    module, function = RECIPES[name].split(":")
    return getattr(importlib.import_module(f"megatron_mtp.recipes.{module}"), function)
