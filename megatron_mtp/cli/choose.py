"""The arguments that choose a config, shared by several commands: recipe, then files, then section.field=value."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, Problem

Recipe = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe (`megatron-mtp recipes` lists them), or your own: module:function or file.py:function."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Config changes, such as model.num_layers=8."),
]
Files = Annotated[
    list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML file with config changes; repeatable.")
]


def choose_config(recipe: str, files: list[Path] | None, overrides: list[str] | None) -> ConfigContainer:
    """The unfinalized config; a later source wins.

    Raises:
        ConfigError: what is wrong in any of the sources.
    """
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe(recipe)
    problems: list[Problem] = []
    if files or overrides:
        from megatron_mtp.config.overrides import apply_overrides, apply_yaml

        changes = [partial(apply_yaml, cfg, file) for file in files or []]
        changes += [partial(apply_overrides, cfg, overrides)] if overrides else []
        for change in changes:
            try:
                change()
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cfg
