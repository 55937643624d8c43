"""`megatron-mtp report`: a run as one HTML page and PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run (logger.log_dir or checkpoint.save), or its .jsonl.")],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another run to draw beside it; repeatable, one after each --compare.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the page and pictures. Default: RUN/report.")
    ] = None,
) -> None:
    """Draw a run, or compare several: one HTML page that needs no network, and a PNG of each chart.

    It reads metrics.jsonl only, so it works while the run trains, after a crash, and on another machine.
    """
    from megatron_mtp.report.page import write_report

    folder = run if run.is_dir() else run.parent
    files = write_report([run, *(compare or [])], output or folder / "report")
    typer.echo(f"{files[0]}: {files[0].stat().st_size / 1e6:.1f} MB, and {len(files) - 1} PNG files beside it")
