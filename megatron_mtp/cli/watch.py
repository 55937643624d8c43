"""`megatron-mtp watch`: a run live in a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of the run (logger.log_dir or checkpoint.save), or its .jsonl.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and leave.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks at the log.")] = 2.0,
) -> None:
    """Watch a run: losses of every depth, gaps, acceptance, signs. Leaves when the run ends, or with Ctrl-C.

    It only reads metrics.jsonl. Where the output is no terminal, each state is printed below the one before.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from megatron_mtp.observe.run_log import open_log
    from megatron_mtp.report.watch import follow, screen

    log = open_log(run)
    if once:
        typer.echo("\n".join(screen(log, time.time())))
        return
    try:
        if sys.stdout.isatty():
            with Live(console=Console(highlight=False), refresh_per_second=4) as live:
                for lines in follow(log, interval):
                    live.update(Text("\n".join(lines), no_wrap=True))
            return
        shown: list[str] = []
        lines = shown
        for lines in follow(log, interval):
            if lines[2:] != shown[2:]:  # the second line holds the age of the last record
                typer.echo("\n".join([*lines, ""]))
                shown = lines
        if lines != shown:
            typer.echo("\n".join(lines))
    except KeyboardInterrupt:
        raise typer.Exit() from None
