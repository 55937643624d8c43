"""`megatron-mtp verify`."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from megatron_mtp.cli.choose import Files, Overrides, Recipe, choose_config, phase_of


def verify(
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            help="Layouts to compare with one rank, such as "
            '"tp=2,sp=1; pp=2,vp=2; pp=4,layout=Ett|tt|mm|L; dp=2,distopt=1". '
            "Keys: tp sp pp vp layout cp ep etp dp distopt overlap mbs recompute. "
            "Default: one layout for each parallelism that the model can use."
        ),
    ] = None,
    phase: Annotated[str | None, typer.Option(help="Name of a phase of the run. Default: what is before them.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Check that parallel layouts compute what one rank computes: the loss of every depth and every gradient.

    The recipe is shrunk to a size that this machine can run, in fp32 on the CPU. Exits with 1 if a layout differs.
    """
    from rich.console import Console

    from megatron_mtp.verify.run import prepare, print_outcomes
    from megatron_mtp.verify.run import verify as run

    # Mistakes are reported before torch is imported or a process starts.
    comparison = prepare(phase_of(choose_config(recipe, config, overrides), phase), layouts)
    console = Console(stderr=True)
    console.print(f"shrunk for this machine: {', '.join(comparison.changes)}", markup=False, highlight=False)
    total = 1 + len(comparison.layouts)
    with console.status("starting") as status:
        done = 0

        def report(what: str) -> None:
            nonlocal done
            done += 1
            line = f"[{done}/{total}] {what}"
            status.update(line.replace("[", "\\[", 1))
            if not console.is_terminal:
                console.print(line, markup=False, highlight=False)

        outcomes = run(comparison, report)
    if json:
        data = {"recipe": recipe, "shrunk": comparison.changes, "outcomes": [outcome.as_dict() for outcome in outcomes]}
        typer.echo(json_format.dumps(data, indent=2))
    else:
        print_outcomes(outcomes)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)
