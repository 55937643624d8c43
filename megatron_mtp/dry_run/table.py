"""A dry run as a table for a person and as plain data for a program."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.units import GIB
from megatron_mtp.dry_run.build import DryRun, StageReport


def print_dry_run(found: DryRun, console: Console) -> None:
    """One row for each stage; equal neighbours share a row."""
    console.print(f"{found.world_size} ranks, layout {found.layout}; memory in GiB", highlight=False)
    table = Table()
    table.add_column("stage", no_wrap=True)
    table.add_column("ranks", no_wrap=True)
    table.add_column("holds", overflow="fold")
    for name in ("parameters", "weights", "grads", "optim", "activ", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for first, last in _alike(found.stages):
        table.add_row(*_row(first, last))
    console.print(table)
    if found.parameters is not None:
        text = f"complete model: {found.parameters:,} parameters, every shared one once; predicted "
        console.print(f"{text}{found.predicted_parameters:,}", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def as_dict(found: DryRun, cfg: ConfigContainer) -> dict[str, Any]:
    """The report and the resolved config as plain data."""
    return {
        "world_size": found.world_size,
        "layout": found.layout,
        "parameters": found.parameters,
        "predicted_parameters": found.predicted_parameters,
        "stages": [_stage_dict(stage) for stage in found.stages],
        "problems": [problem.as_dict() for problem in found.problems],
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
        "planned_bytes": asdict(stage.planned),
        "peak_bytes": stage.peak_bytes,
        "built": [{n: value for n, value in asdict(built).items() if n != "full_sizes"} for built in stage.built],
    }


def _alike(stages: list[StageReport]) -> list[tuple[StageReport, StageReport]]:
    """First and last of each run of stages whose rows are equal."""
    runs: list[tuple[StageReport, StageReport]] = []
    for stage in stages:
        if runs and _cells(runs[-1][1]) == _cells(stage) and runs[-1][1].stage + 1 == stage.stage:
            runs[-1] = (runs[-1][0], stage)
        else:
            runs.append((stage, stage))
    return runs


def _cells(stage: StageReport) -> list[str]:
    full, temporary = stage.fullest, stage.planned.activations + stage.planned.workspace
    sizes = (full.weight_bytes, full.gradient_bytes, full.optimizer_bytes, temporary, stage.peak_bytes)
    digits = 3 if stage.peak_bytes < GIB else 2
    return [" ".join(stage.holds), f"{full.parameters:,}", *(f"{size / GIB:.{digits}f}" for size in sizes)]


def _row(first: StageReport, last: StageReport) -> list[str]:
    stages = str(first.stage) if first is last else f"{first.stage}-{last.stage}"
    ranks = sorted({first.ranks[0], last.ranks[-1]})
    return [stages, "-".join(map(str, ranks)), *_cells(first)]
