"""`megatron-mtp doctor`: reports what this machine can run, or whether it is fit to be a node of a job."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from megatron_mtp.cli.choose import Files, Overrides, choose_config
from megatron_mtp.errors import ConfigError


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="With --node: recipe of the run whose files this machine must see.")
    ] = None,
    overrides: Overrides = None,
    config: Files = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write a report to attach to a bug report; it contains no secrets.")
    ] = None,
    node: Annotated[
        bool, typer.Option("--node", help="Check this machine as a node of a job, as `launch` does before ranks start.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=0, help="With --node: GPUs that the job uses on each machine.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what this machine can run, and what to install for more. Exit code 1 if it cannot train."""
    if node:
        return _check_node(recipe, overrides, config, gpus)
    if recipe or gpus or config:
        raise ConfigError("A recipe, --config and --gpus work only with --node. Add it, or leave them out.")
    from megatron_mtp.doctor.report import abilities, as_dict, examine, print_table, report_text

    findings = examine()
    if json:
        typer.echo(json_format.dumps(as_dict(findings), indent=2))
    else:
        print_table(findings)
    if report:
        try:
            report.write_text(report_text(findings), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--report {report}: cannot be written: {error.strerror}. Choose another folder."
            ) from error
        typer.echo(f"report written to {report}", err=True)
    if not any(abilities(findings).values()):
        raise typer.Exit(1)


def _check_node(recipe: str | None, overrides: list[str] | None, config: list[Path] | None, gpus: int) -> None:
    """Prints what is found on one line.

    Raises:
        NodeError: the machine is not fit.
        ConfigError: files of the run are missing here, or cannot be written.
    """
    from megatron_mtp.doctor.node import examine_node, fail_if_unfit, node_name

    cfg = None if recipe is None else choose_config(recipe, config, overrides).finalize()
    found = examine_node(gpus, cfg)
    typer.echo(f"{node_name()}: {', '.join(found.facts)}")
    fail_if_unfit(found)
