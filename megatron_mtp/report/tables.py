"""The tables of a report, as plain cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from megatron_mtp.config.units import GIB
from megatron_mtp.observe.run_log import RunLog
from megatron_mtp.parallel.facts import short_count
from megatron_mtp.report.charts import PEAK_MEMORY, Chart, ReportRun, validation_sets
from megatron_mtp.report.curves import Axes, curve, depths, flop_per_token
from megatron_mtp.report.marks import KINDS, SIGNS_AND_FAULTS, interruption_text, without_iteration
from megatron_mtp.report.state import status

ROWS = 15
"""Steps that the data table of a chart shows."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table: text in the first `num_text` columns and numbers behind them.

    Args:
        rows: cells; the first one is the heading of its row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1


def overview(runs: Sequence[ReportRun], now: float) -> TextTable:
    """What each run is and how far it came."""
    rows = [[label, *(text(run.log, now) for run in runs)] for label, text in _OVERVIEW.items()]
    for depth in ["lm", *(f"mtp_{k}" for k in sorted({k for run in runs for k in depths(run.log)}))]:
        rows.append([f"{depth} loss, last 20 records", *(_mean(run.log, f"{depth} loss") for run in runs)])
    for name in dict.fromkeys(name for run in runs for name in validation_sets(run.log)):
        rows += _held_out_rows(runs, name)
    for k in sorted({k for run in runs for k in depths(run.log)}):
        kept = f"mtp_{k}/accepted_over_run"
        rows.append([f"mtp_{k} accepted, whole run", *(number(run.log.last().get(kept)) for run in runs)])
    for label, metric in _RATES.items():
        rows.append([label, *(_mean(run.log, metric) for run in runs)])
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return TextTable("The runs of this report", ["", *(run.name for run in runs)], rows)


def _held_out_rows(runs: Sequence[ReportRun], name: str) -> list[list[str]]:
    last: list[dict[str, Any]] = [
        next((e for e in reversed(run.log.evaluations) if e["name"] == name), {}) for run in runs
    ]
    metrics = list(dict.fromkeys(key for line in last for key in line if _is_shown(key)))
    return [[f"{name}: {metric}", *(number(line.get(metric)) for line in last)] for metric in metrics]


def _is_shown(metric: str) -> bool:
    return metric.endswith((" loss", "ppl", "/accepted", "accepted_length"))


def _iteration(log: RunLog, now: float) -> str:
    total = log.start.get("train_iters")
    return f"{log.last().get('iteration', 0):,.0f}" + (f" of {total:,}" if total else "")


def _tokens(log: RunLog, now: float) -> str:
    tokens = log.last().get("consumed-tokens")
    return "-" if tokens is None else short_count(int(tokens))


def _hours(log: RunLog, now: float) -> str:
    hours = Axes.of(log).places.get("hours", np.empty(0))
    return f"{hours[-1]:.3g} h" if len(hours) else "-"


def _flop(log: RunLog, now: float) -> str:
    flop, tokens = flop_per_token(log), log.last().get("consumed-tokens")
    return "-" if flop is None or tokens is None else f"{flop * tokens:.3g}"


def _device(log: RunLog, now: float) -> str:
    return f"{log.start['world_size']} x {log.start['device']}" if "device" in log.start else "-"


def _started(log: RunLog, now: float) -> str:
    if "time" not in log.first:
        return "-"
    return datetime.fromtimestamp(log.first["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")


_OVERVIEW: dict[str, Callable[[RunLog, float], str]] = {
    "state": status,
    "recipe": lambda log, now: str(log.start.get("recipe") or "-"),
    "devices": _device,
    "started": _started,
    "steps": _iteration,
    "tokens": _tokens,
    "time in steps": _hours,
    "FLOP of the model": _flop,
    "restarts and rollbacks": lambda log, now: f"{len(log.interruptions)}",
    "steps with a NaN": lambda log, now: f"{np.nansum(log.column('nan-iterations')[1]):.0f}",
    "skipped updates": lambda log, now: f"{np.nansum(log.column('skipped-iterations')[1]):.0f}",
}
_RATES = {
    "drafted tokens accepted per step, training": "mtp/accepted_length",
    "tokens/s per device": "perf/tokens_per_s_per_device",
    "TFLOP/s per device": "perf/tflops_per_device",
    "MFU": "perf/mfu",
    "step time (ms)": "perf/iteration_time_ms",
}


def _mean(log: RunLog, name: str) -> str:
    found = curve(log, name)
    mean = found.mean_of_last()
    return "NaN" if mean is None and found.num_bad else number(mean)


def number(value: float | None) -> str:
    """Five digits; a dash where there is none."""
    return "-" if value is None else f"{value:.5g}"


def signs(runs: Sequence[ReportRun]) -> TextTable:
    """Every sign and fault, in order."""
    rows = [
        [f"{line['iteration']:,}", run.name, KINDS[line["kind"]], without_iteration(line.get("text", ""))]
        for run in runs
        for line in run.log.texts
        if line["kind"] in SIGNS_AND_FAULTS
    ]
    return TextTable("Health signs and faults", ["step", "run", "kind", "what"], rows, num_text=4)


def restarts(runs: Sequence[ReportRun]) -> TextTable:
    """Starts after the first, and rollbacks."""
    rows = []
    for run in runs:
        layout = _layout(run.log.first)
        for one in run.log.interruptions:
            text = interruption_text(one)
            if one.line["kind"] == "start":
                if (now := _layout(one.line)) != layout:
                    text += f"; layout {layout} -> {now}"
                layout = now
            rows.append([f"{one.line['iteration']:,}", run.name, KINDS[one.line["kind"]], f"{one.lost:,}", text])
    return TextTable("Restarts and rollbacks", ["step", "run", "kind", "steps lost", "what"], rows, num_text=5)


SIZES = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}


def _layout(start: dict[str, Any]) -> str:
    model = start.get("config", {}).get("model", {})
    sizes = [f"{short} {model.get(f'{name}_parallel_size', 1)}" for short, name in SIZES.items()]
    return ", ".join([*sizes, f"{start.get('world_size', '?')} processes"])


def memory(runs: Sequence[ReportRun]) -> TextTable:
    """Planned beside measured memory of each pipeline stage, in GiB."""
    rows = []
    for run in runs:
        plan = run.log.start.get("extra", {}).get("plan", {}).get("memory", [])
        measured = {
            int(name.removeprefix(PEAK_MEMORY)): float(np.nanmax(run.log.column(name)[1]))
            for name in run.log.names()
            if name.startswith(PEAK_MEMORY)
        }
        for stage in sorted({*range(len(plan)), *measured}):
            parts = [size / GIB for size in plan[stage].values()] if stage < len(plan) else []
            cells = [f"{part:.3g}" for part in [*parts, sum(parts)]] if parts else ["-"] * 6
            rows.append([f"{run.name}, stage {stage}", *cells, number(measured.get(stage))])
    parts = ["weights", "gradients", "optimizer", "activations", "workspace"]
    return TextTable("Memory of one rank of each stage in GiB", ["", *parts, "planned", "measured"], rows)


def step_times(runs: Sequence[ReportRun]) -> TextTable:
    """Planned beside measured time of a step, in ms."""
    rows = []
    for run in runs:
        plan = run.log.start.get("extra", {}).get("plan", {})
        if step := plan.get("step_ms"):
            measured = curve(run.log, "perf/iteration_time_ms").mean_of_last()
            cells = [f"{value:.4g}" for value in [*step.values(), sum(step.values())]]
            rows.append([f"{run.name}, planned for {plan['machine']}", *cells, number(measured)])
    header = ["", "pipeline", "update", "data parallel", "other", "planned", "measured"]
    return TextTable("Time of one step in ms", header, rows)


def phases_table(runs: Sequence[ReportRun]) -> TextTable:
    """What the schedule changes at which step."""
    rows = [
        [f"{change['step']:,}", run.name, change["what"]]
        for run in runs
        for change in run.log.start.get("extra", {}).get("milestones", [])
    ]
    return TextTable("Phases of the schedule", ["step", "run", "what"], rows, num_text=3)


def differences(runs: Sequence[ReportRun]) -> TextTable:
    """Fields of the configs that are not the same in all runs."""
    flat = [_flat(run.log.start.get("config", {})) for run in runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [
        [name, *(_value(fields, name) for fields in flat)]
        for name in names
        if any(fields.get(name, _MISSING) != flat[0].get(name, _MISSING) for fields in flat)
    ]
    return TextTable("Config fields that differ", ["field", *(run.name for run in runs)], rows, len(runs) + 1)


_MISSING = object()


def _value(fields: dict[str, Any], name: str) -> str:
    return str(fields[name]) if name in fields else "-"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, fields in config.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }


def data_table(chart: Chart) -> TextTable:
    """Logged values of a chart at some steps, spread evenly, and at evaluations; first and last are among them."""
    shown = np.union1d(_spread(chart, points=False), _spread(chart, points=True))
    rows = []
    for step in shown:
        cells = []
        for line in chart.series:
            place = np.searchsorted(line.curve.iteration, step)
            is_known = place < len(line.curve.iteration) and line.curve.iteration[place] == step
            cells.append(f"{line.curve.value[place]:.6g}" if is_known else "-")
        rows.append([f"{step:,.0f}", *cells])
    header = ["step", *(line.label for line in chart.series)]
    return TextTable(f"{chart.plot.title}: logged values at {len(rows)} steps, {chart.plot.unit}", header, rows)


def _spread(chart: Chart, *, points: bool) -> np.ndarray:
    found = [line.curve.iteration for line in chart.series if line.points == points]
    at = np.unique(np.concatenate(found)) if found else np.empty(0)
    return at[np.unique(np.linspace(0, len(at) - 1, min(ROWS, len(at))).round().astype(int))]
