"""Options of `megatron-mtp launch` that several of its commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    str | None,
    typer.Argument(help="Name of a recipe, or your own: module:function or file.py:function. None with --script."),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="Config changes. With --script: its arguments, after '--'."
    ),
]
Script = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Run your own training script, which calls megatron_mtp.main, not a recipe."),
]
NoGpus = Annotated[bool, typer.Option("--cpu", help="With --script: its ranks need no GPUs.")]
Nodes = Annotated[int, typer.Option(min=1, help="Number of machines.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="Processes per machine, one per GPU.")]
MaxRestarts = Annotated[int, typer.Option(min=0, help="How often failed ranks restart in place before the job fails.")]
Name = Annotated[str | None, typer.Option(help="Name of the job. Default: the recipe's name.")]
Env = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=VALUE]", help="Environment variable; NAME alone takes its value here. Repeatable."),
]
Setup = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Shell file that every node reads first, such as module loads.")
]
Logs = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the output of every rank. Default: logger.log_dir/ranks, or checkpoint.save with .logs.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")]
