"""`megatron-mtp recipes`: lists the recipes."""

from __future__ import annotations

import inspect
import json as json_format
import sys
from typing import Annotated, Any

import typer


def recipes(json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the recipes: parameters, MTP depths, default parallel sizes, devices."""
    rows = [describe(name) for name in names()]
    if json:
        typer.echo(json_format.dumps(rows, indent=2))
    else:
        _print_table(rows)


def names() -> list[str]:
    """Names of all recipes."""
    from megatron_mtp.recipes import RECIPES

    return list(RECIPES)


def describe(name: str) -> dict[str, Any]:
    """One recipe as plain data."""
    from megatron_mtp.parallel.facts import facts
    from megatron_mtp.recipes import get_recipe, recipe_function
    from megatron_mtp.recipes.published import PUBLISHED

    doc, found = inspect.getdoc(recipe_function(name)) or "", facts(get_recipe(name).finalize())
    found["num_devices"] = PUBLISHED[name].gpus if name in PUBLISHED else found["processes"]
    return {"name": name, "description": " ".join(doc.split("\n\n")[0].split()), **found}


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Prints plain text: importing a table library would add half to the time that this command takes."""
    from megatron_mtp.parallel.facts import short_count, short_parallel

    cells = [("recipe", "parameters", "active", "MTP depths", "devices", "parallel")]
    for row in rows:
        total, active = (short_count(row["parameters"][name]) for name in ("total", "active"))
        devices = f"{row['num_devices']} x {row['devices']}"
        cells.append((row["name"], total, active, str(row["mtp_num_layers"]), devices, short_parallel(row["parallel"])))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        name, *counts, devices, parallel = (
            cell.rjust(width) if 1 <= idx <= 3 else cell.ljust(width)
            for idx, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text = "  ".join([name, *counts, devices, parallel]).rstrip()
        typer.secho(text, bold=number == 0 and sys.stdout.isatty())
    typer.echo(
        "\nParameters include the MTP layers; active ones are those that one token uses. Devices: what the\n"
        "parallel sizes are for, with 80 GB each; `plan` takes as many. Next: megatron-mtp show RECIPE"
    )
