"""`megatron-mtp doctor`: reports what this machine can run."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    report: Annotated[
        Path | None, typer.Option(help="Also write a report to attach to a bug report; it contains no secrets.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what this machine can run, and what to install for more. Exit code 1 if it cannot train."""
    from megatron_mtp.doctor.report import abilities, as_dict, examine, print_table, report_text
    from megatron_mtp.errors import ConfigError

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
