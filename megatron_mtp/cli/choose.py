"""The arguments that choose a config, shared by several commands: recipe, then files, then section.field=value."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, Problem, nearest

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
Callbacks = Annotated[
    list[str] | None,
    typer.Option(
        "--callback",
        metavar="NAME",
        help="Callback of your own, as file.py:Class or module:Class; repeatable. Added to train.callbacks, each once.",
    ),
]


def choose_config(
    recipe: str, files: list[Path] | None, overrides: list[str] | None, callbacks: list[str] | None = None
) -> ConfigContainer:
    """The unfinalized config; a later source wins. The names of `callbacks` are added to train.callbacks,
    each once.

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
    if callbacks:
        from megatron_mtp.recipes.own import absolute

        once: dict[str, str] = {}
        for name in (*cfg.train.callbacks, *callbacks):
            once.setdefault(absolute(name), name)
        cfg.train.callbacks = list(once.values())
    return cfg


def phase_of(cfg: ConfigContainer, name: str | None) -> ConfigContainer:
    """The config of one phase of a run, not finalized and without phases; None: of what is before them.

    Raises:
        ConfigError: the config is wrong, or has no such phase.
    """
    from megatron_mtp.config.phase_configs import before_phases, phase_configs

    if name is None:
        return before_phases(cfg)

    found = {overlay.name: present for overlay, present in phase_configs(cfg.copy().finalize())}
    if name not in found:
        rule = f"there is no such phase.{nearest(name, found)}"
        known = f"Phases: {', '.join(found)}." if found else "The config has no phases."
        raise ConfigError(Problem(fields=("--phase",), value=name, rule=rule, remedy=known))
    return found[name]


def open_vocabulary(cfg: ConfigContainer) -> str | None:
    """Sets model.vocab_size, where it is open, to the size of the tokenizer. Imports no torch.

    Returns:
        Why the tokenizer cannot be opened on this machine; None: it can, or it has no file.
    """
    if cfg.tokenizer.tokenizer_model is None:
        return None
    from megatron_mtp.data.tokenizer import configured_tokenizer
    from megatron_mtp.errors import DataError

    try:
        tokenizer = configured_tokenizer(cfg)
    except DataError as error:
        return str(error)
    if cfg.model.vocab_size is None and tokenizer is not None:
        cfg.model.vocab_size = tokenizer.vocab_size
    return None


def check_named_callbacks(cfg: ConfigContainer) -> None:
    """Imports the classes that train.callbacks names. Call it after `finalize`: this may import torch.

    Raises:
        ConfigError: one cannot be imported, or is no callback.
    """
    if cfg.train.callbacks:
        from megatron_mtp.training.callbacks.named import check_named_callbacks as check

        check(cfg.train.callbacks)
