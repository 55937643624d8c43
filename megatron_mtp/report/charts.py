"""Which curves a report shows, and the data of each chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_mtp.observe.run_log import RunLog
from megatron_mtp.report.curves import AXES, Axes, Curve, Reduced, curve, depths, held_out, reduced
from megatron_mtp.report.marks import Mark, marks, shown_marks

PEAK_MEMORY = "perf/peak_memory_gib_stage_"


@dataclass(frozen=True, slots=True)
class ReportRun:
    """A run as a report shows it.

    Args:
        name: the same for no two runs of a report.
        log: read as far as it is written.
    """

    name: str
    log: RunLog
    axes: Axes
    marks: list[Mark]

    @classmethod
    def of(cls, name: str, log: RunLog) -> ReportRun:
        """From its log."""
        return cls(name, log, Axes.of(log), marks(log))


@dataclass(frozen=True, slots=True)
class Plot:
    """What one chart shows.

    Args:
        key: short name, for the files of the pictures.
        metrics: names as `curves.curve` knows them -> their labels.
        unit: of the values.
        is_split: with several runs, each metric has a chart of its own.
        with_held_out: points of the validation sets are drawn too.
        note: what the reader must know.
    """

    key: str
    title: str
    metrics: dict[str, str]
    unit: str
    is_split: bool = False
    with_held_out: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Args:
        color: index into the page's colours.
        dash: index into the page's line patterns.
        points: a held-out curve is drawn as points.
    """

    label: str
    run: ReportRun
    curve: Curve
    color: int
    dash: int = 0
    points: bool = False

    @property
    def reduced(self) -> Reduced:
        """In as many points as are drawn."""
        return reduced(self.curve)


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with its lines; at least one of them has a value."""

    plot: Plot
    series: list[Series] = field(default_factory=list)


def plots(runs: Sequence[ReportRun]) -> list[Plot]:
    """What a report of these runs can show, in the order of the page."""
    levels = sorted({depth for run in runs for depth in depths(run.log)})
    names = list(dict.fromkeys(name for run in runs for name in run.log.names()))
    of_depths = [f"mtp_{k}" for k in levels]
    stages = sorted((n for n in names if n.startswith(PEAK_MEMORY)), key=lambda name: int(name.rsplit("_", 1)[1]))
    router = [name for name in names if name in ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")]

    def each(form: str) -> dict[str, str]:
        return {form.format(depth): depth for depth in of_depths}

    losses = {"lm loss": "lm"} | each("{} loss")
    gap_note = "The gap is the loss of a depth minus the main loss. It should fall or stay; more than 1.0 up is a sign."
    found = [
        Plot("losses", "Loss of every depth", losses, "nats per token", True, True),
        Plot("gap", "Gap of every depth to the main loss", each("gap/{}"), "nats per token", True, note=gap_note),
        Plot(
            "acceptance",
            "Acceptance of every depth",
            each("{}/accepted"),
            "share of slots",
            True,
            note="Share of the slots at which this depth and all before it agree with the main prediction.",
        ),
        Plot("accepted_length", "Drafted tokens accepted per step", {"mtp/accepted_length": "tokens"}, "tokens"),
        Plot("throughput", "Throughput", {"perf/tokens_per_s_per_device": "tokens/s"}, "tokens/s per device"),
        Plot("mfu", "Model FLOP utilisation (MFU)", {"perf/mfu": "MFU"}, "share of the dense peak"),
        Plot("step_time", "Step time", {"perf/iteration_time_ms": "step time"}, "ms"),
        Plot("grad_norm", "Norm of the gradient before clipping", {"grad-norm": "grad norm"}, "L2 norm"),
        Plot("learning_rate", "Learning rate", {"learning-rate": "learning rate"}, "learning rate"),
        Plot("loss_factor", "MTP loss factor", {"mtp/loss_scaling_factor": "factor"}, "weight of the mean MTP loss"),
        Plot("router", "Losses of the routers", {name: name for name in router}, "loss", True),
        Plot("memory", "Peak memory of each stage", {n: f"stage {n.rsplit('_', 1)[1]}" for n in stages}, "GiB", True),
    ]
    return [plot for plot in found if plot.metrics]


def charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Every chart that has something to show."""
    found = []
    for plot in plots(runs):
        for part in _parts(plot, len(runs)):
            chart = Chart(part, _series(part, runs))
            if any(np.isfinite(line.curve.value).any() or line.curve.num_bad for line in chart.series):
                found.append(chart)
    return found


def _parts(plot: Plot, num_runs: int) -> list[Plot]:
    if num_runs == 1 or not plot.is_split:
        return [plot]
    return [
        Plot(
            f"{plot.key}_{label.replace(' ', '_')}",
            f"{plot.title}: {label}",
            {name: label},
            plot.unit,
            False,
            plot.with_held_out,
            plot.note,
        )
        for name, label in plot.metrics.items()
    ]


def _series(plot: Plot, runs: Sequence[ReportRun]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        for index, (name, label) in enumerate(plot.metrics.items()):
            color, dash = (number, index) if len(runs) > 1 else (index, 0)
            shown = f"{run.name}: {label}" if len(runs) > 1 else label
            line = curve(run.log, name)
            if len(line.value):
                found.append(Series(shown, run, line, color, dash))
            for valid in validation_sets(run.log) if plot.with_held_out else ():
                points = held_out(run.log, valid, name)
                if len(points.value):
                    found.append(Series(f"{shown}, {valid}", run, points, color, dash, points=True))
    return found


def validation_sets(log: RunLog) -> list[str]:
    """Names of the validation sets that were evaluated."""
    return list(dict.fromkeys(line["name"] for line in log.evaluations))


def page_data(runs: Sequence[ReportRun], found: Sequence[Chart]) -> dict[str, Any]:
    """Everything that the page's script draws, as JSON values."""
    places: list[dict[str, list[float | None]]] = []
    known: dict[tuple[int, bytes], int] = {}
    numbers = {id(run): number for number, run in enumerate(runs)}

    def place(run: ReportRun, iteration: np.ndarray) -> int:
        key = numbers[id(run)], iteration.tobytes()
        if key not in known:
            known[key] = len(places)
            places.append({axis: _plain(run.axes.at(axis, iteration)) for axis in run.axes.places})
        return known[key]

    def series(line: Series) -> dict[str, Any]:
        short = line.reduced
        data: dict[str, Any] = {"label": line.label, "run": numbers[id(line.run)], "color": line.color}
        data |= {"dash": line.dash, "points": line.points, "x": place(line.run, short.iteration)}
        data["y"] = _plain(short.mean)
        if not np.array_equal(short.low, short.high, equal_nan=True):
            data |= {"low": _plain(short.low), "high": _plain(short.high)}
        if len(short.bad):
            data["bad"] = place(line.run, short.bad[:200])
        return data

    return {
        "axes": [
            {"key": key, "label": label} for key, label in AXES.items() if any(key in r.axes.places for r in runs)
        ],
        "runs": [
            {
                "name": r.name,
                "marks": [m.as_dict() | {"x": place(r, np.array([float(m.iteration)]))} for m in shown_marks(r.marks)],
            }
            for r in runs
        ],
        "charts": [
            {"key": c.plot.key, "unit": c.plot.unit, "series": [series(line) for line in c.series]} for c in found
        ],
        "places": places,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Six significant digits; None for NaN, because JSON has none."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]


def summary(line: Series) -> str:
    """One line of a chart in words, for those who do not see it."""
    value, iteration = line.curve.value, line.curve.iteration
    finite = np.flatnonzero(np.isfinite(value))
    if not len(finite):
        return f"{line.label}: no finite value in {len(value):,} records."
    low, high = finite[value[finite].argmin()], finite[value[finite].argmax()]
    text = (
        f"{line.label}: from {value[finite[0]]:.4g} at step {iteration[finite[0]]:,.0f} to {value[finite[-1]]:.4g} at "
        f"step {iteration[finite[-1]]:,.0f}; lowest {value[low]:.4g} at step {iteration[low]:,.0f}, highest "
        f"{value[high]:.4g} at step {iteration[high]:,.0f}."
    )
    return text + (f" {line.curve.num_bad:,} values are not finite." if line.curve.num_bad else "")


def file_name(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w-]+", "_", text)
