"""`megatron-mtp show`: the resolved config as YAML that can be used again, with facts and hints as comments."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated, Any

import typer

from megatron_mtp.cli.choose import (
    Callbacks,
    Files,
    Overrides,
    Recipe,
    check_named_callbacks,
    choose_config,
    open_vocabulary,
)
from megatron_mtp.config import ConfigContainer


def show(
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    callback: Callbacks = None,
    diff: Annotated[bool, typer.Option("--diff", help="Only what differs from the recipe.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Also check the sizes for this many processes.")] = None,
) -> None:
    """Print the resolved config of a run, with sizes and hints.

    Opens no data and no checkpoint, so a laptop can show the config of a cluster; a tokenizer that cannot be opened is
    a hint. The output is YAML for --config.
    """
    from megatron_mtp.config.hints import hints
    from megatron_mtp.parallel.card import WIDTH, phase_facts, phase_rows, render, run_rows
    from megatron_mtp.parallel.facts import facts
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.recipes import get_recipe

    cfg = choose_config(recipe, config, overrides, callback)
    sized = cfg.copy()  # the config that is printed stays open for another tokenizer
    cfg.finalize(world_size)
    reason = open_vocabulary(sized)
    sized.finalize(world_size)
    check_named_callbacks(cfg)
    changes = differences(get_recipe(recipe).finalize().to_dict(), cfg.to_dict())
    run = resolve(sized, world_size)
    advice = hints(cfg)
    if reason is not None:
        advice.append(f"tokenizer.tokenizer_model: {reason} A run on this machine would be refused.")
    if json:
        found = {**facts(sized), "layout": run.layout.string}
        data = {"recipe": recipe, **found, "changes": changes, "hints": advice, "config": cfg.to_dict()}
        if cfg.phases:
            data["phases"] = phase_facts(run.timeline)
        typer.echo(json_format.dumps(data, indent=2))
        return
    rows = [("recipe", recipe), *run_rows(run, is_size_open=world_size is None), *phase_rows(run)]
    _comment(render(rows, WIDTH - len("# ")).splitlines())
    typer.echo(_diff_text(changes) if diff else _config_text(cfg, changes))
    _comment([f"hint: {hint}" for hint in advice])


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields whose values differ: "section.field" -> {"recipe": ..., "here": ...}."""
    return {
        f"{section}.{name}": {"recipe": before[section].get(name), "here": values.get(name)}
        for section, values in after.items()
        for name in {**values, **before[section]}  # only phases may be missing
        if before[section].get(name) != values.get(name)
    }


def _comment(lines: list[str]) -> None:
    color = typer.colors.CYAN if sys.stdout.isatty() else None
    for line in lines:
        typer.secho(f"# {line}", fg=color)


def _diff_text(changes: dict[str, dict[str, Any]]) -> str:
    if not changes:
        return "# nothing differs from the recipe"
    return "\n".join(f"{path}: {_inline(pair['recipe'])} -> {_inline(pair['here'])}" for path, pair in changes.items())


def _config_text(cfg: ConfigContainer, changes: dict[str, dict[str, Any]]) -> str:
    lines = []
    for section, values in cfg.to_dict().items():
        lines.append(f"{section}:")
        for name, value in values.items():
            change = changes.get(f"{section}.{name}")
            note = f"  # recipe: {_inline(change['recipe'])}" if change else ""
            lines.append(f"  {name}: {_inline(value)}{note}")
    missing = [path for path in changes if path.startswith("phases.") and changes[path]["here"] is None]
    lines += [f"  {path.removeprefix('phases.')}: null  # of the recipe, taken away" for path in missing]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """One value on one line, as YAML."""
    from megatron_mtp.config.yaml_text import dump_inline

    return dump_inline(value)
