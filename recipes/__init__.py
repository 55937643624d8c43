"""Named runs. A recipe is a function that returns a ConfigContainer; a variant calls its parent and changes fields.

Importing this package imports no recipe: the command line lists names in milliseconds.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mtp.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mtp.config.container import ConfigContainer

# name on the command line -> "module under megatron_mtp.recipes:function"
RECIPES: dict[str, str] = {
    "demo": "demo:demo_pretrain_config",
    "tiny_dense": "tiny:tiny_dense_pretrain_config",
    "tiny_moe": "tiny:tiny_moe_pretrain_config",
    "tiny_mla_moe": "tiny:tiny_mla_moe_pretrain_config",
    "qwen3_30b_a3b": "qwen.qwen3_moe:qwen3_30b_a3b_pretrain_config",
    "deepseek_v3": "deepseek.deepseek_v3:deepseek_v3_pretrain_config",
}


def get_recipe(name: str) -> ConfigContainer:
    """Returns a fresh, unfinalized config of the recipe `name`.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest ones.
    """
    return recipe_function(name)()


def recipe_function(name: str) -> Callable[[], ConfigContainer]:
    """The function of a recipe; raises as `get_recipe`."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"There is no recipe {name!r}.{meant} Known recipes: {', '.join(RECIPES)}.")
    module, function = RECIPES[name].split(":")
    return getattr(importlib.import_module(f"megatron_mtp.recipes.{module}"), function)
