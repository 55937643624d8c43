"""A dry run as a table for a person and as plain data for a program."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mtp.config import ConfigContainer
from megatron_mtp.tools.dry_run import DryRun, StageReport

GIB = 2**30


def print_dry_run(found: DryRun, console: Console) -> None:
    """One row for each stage; equal neighbours share one."""
    console.print(f"{found.world_size} ranks, layout {found.layout}", highlight=False)
    table = Table()
    table.add_column("stage", no_wrap=True)
    table.add_column("ranks", no_wrap=True)
    table.add_column("holds", overflow="fold")
    for name in ("parameters", "weights", "grads", "optim", "sum GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for first, last in _alike(found.stages):
        table.add_row(*_row(first, last))
    console.print(table)
    if found.parameters is not None:
        console.print(
            f"whole model: {found.parameters:,} parameters, every shared one once; predicted {found.predicted_parameters:,}",
            highlight=False,
        )
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def as_dict(found: DryRun, cfg: ConfigContainer) -> dict[str, Any]:
    """Everything that was found, and the resolved config."""
    return {
        "world_size": found.world_size,
        "layout": found.layout,
        "parameters": found.parameters,
        "predicted_parameters": found.predicted_parameters,
        "stages": [_stage_dict(stage) for stage in found.stages],
        "problems": found.problems,
        "notes": found.notes,
        "config": cfg.to_dict(),
    }


def _stage_dict(stage: StageReport) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "ranks": [stage.ranks[0], stage.ranks[-1]],
        "num_ranks": len(stage.ranks),
        "holds": list(stage.holds),
        "predicted_parameters": stage.predicted_parameters,
        "built": [
            {
                "rank": built.rank,
                "parameters": built.parameters,
                "expert_parameters": built.expert_parameters,
                "weight_bytes": built.weight_bytes,
                "gradient_bytes": built.gradient_bytes,
                "optimizer_bytes": built.optimizer_bytes,
            }
            for built in stage.built
        ],
    }


def _alike(stages: list[StageReport]) -> list[tuple[StageReport, StageReport]]:
    """First and last of each run of stages whose figures are equal."""
    runs: list[tuple[StageReport, StageReport]] = []
    for stage in stages:
        if runs and _figures(runs[-1][1]) == _figures(stage) and runs[-1][1].stage + 1 == stage.stage:
            runs[-1] = (runs[-1][0], stage)
        else:
            runs.append((stage, stage))
    return runs


def _figures(stage: StageReport) -> list[str]:
    largest = max(stage.built, key=lambda built: built.optimizer_bytes)
    sizes = [largest.weight_bytes, largest.gradient_bytes, largest.optimizer_bytes]
    return [" ".join(stage.holds), f"{largest.parameters:,}", *(f"{size / GIB:.3f}" for size in (*sizes, sum(sizes)))]


def _row(first: StageReport, last: StageReport) -> list[str]:
    stages = str(first.stage) if first is last else f"{first.stage}-{last.stage}"
    ranks = sorted({first.ranks[0], last.ranks[-1]})
    return [stages, "-".join(map(str, ranks)), *_figures(first)]
