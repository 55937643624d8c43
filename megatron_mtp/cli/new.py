"""`megatron-mtp new`: a small project with a recipe of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(help="Name of the folder to write, and of the recipe's function in it.")],
) -> None:
    """Write a small project that trains at once: a recipe, a callback, an overlay for a cluster, a README."""
    from megatron_mtp.examples.new_project import new_project

    for file in new_project(name, Path()):
        typer.echo(f"wrote {file}", err=True)
    typer.echo(f"Next: cd {name} && megatron-mtp pretrain recipe.py:{name} --callback callbacks.py:Progress")
