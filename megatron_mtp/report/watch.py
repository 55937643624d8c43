"""A run in a terminal of 80 columns, drawn again whenever its log has grown."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from megatron_mtp.observe.run_log import RunLog
from megatron_mtp.report.charts import validation_sets
from megatron_mtp.report.curves import Curve, curve, depths
from megatron_mtp.report.marks import KINDS, SIGNS_AND_FAULTS, interruption_text, without_iteration
from megatron_mtp.report.state import end_of, status

WIDTH = 80
LINE = 24
"""Characters of a small curve."""
BARS = "▁▂▃▄▅▆▇█"
MARKS = 6
"""Signs, faults and restarts that are shown, the newest last."""


def screen(log: RunLog, now: float) -> list[str]:
    """The run as lines of at most WIDTH characters."""
    last = log.last()
    done, total = int(last.get("iteration", 0)), log.start.get("train_iters")
    lines = [
        f"{log.place.resolve().name}: {log.start.get('recipe') or 'a run'}, {_progress(done, total)}",
        status(log, now),
    ]
    lines += [_rates(log, last, done, total), ""]
    lines.append(f"{'':<9}{'now':>9}{'mean 20':>9}{'gap':>8}{'accepted':>9}{'held out':>9}  {'over the run':<{LINE}}")
    lines += [_depth_line(log, depth) for depth in ["lm", *(f"mtp_{k}" for k in depths(log))]]
    if marks := _marks(log):
        lines += ["", "signs, faults, restarts", *marks[-MARKS:]]
    return [line[:WIDTH] for line in lines]


def follow(log: RunLog, interval_s: float) -> Iterator[list[str]]:
    """Screens of a run: now, and each time that the log has grown, until the run ends."""
    while True:
        yield screen(log, time.time())
        if end_of(log) is not None:
            return
        while not log.update():
            time.sleep(interval_s)
            yield screen(log, time.time())


def _progress(done: int, total: int | None) -> str:
    return f"step {done:,}" if total is None else f"step {done:,} of {total:,} ({done / total:.0%})"


def _rates(log: RunLog, last: dict[str, float], done: int, total: int | None) -> str:
    step_ms = curve(log, "perf/iteration_time_ms").mean_of_last()
    parts = []
    if step_ms is not None:
        parts.append(f"{step_ms:,.0f} ms a step")
        if total is not None and end_of(log) is None:
            parts.append(f"{_time((total - done) * step_ms / 1e3)} left")
    for name, unit, form in (
        ("perf/tokens_per_s_per_device", "tokens/s per device", ",.0f"),
        ("perf/mfu", "MFU", ".1%"),
        ("grad-norm", "grad norm", ".3g"),
    ):
        if name in last:
            parts.append(f"{last[name]:{form}} {unit}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _depth_line(log: RunLog, depth: str) -> str:
    loss, gap = curve(log, f"{depth} loss"), curve(log, f"gap/{depth}")
    accepted = curve(log, f"{depth}/accepted").mean_of_last()
    held_out = None
    if sets := validation_sets(log):
        held_out = next((e.get(f"{depth} loss") for e in reversed(log.evaluations) if e["name"] == sets[0]), None)
    cells = [
        _loss(loss.value[-1] if len(loss.value) else None),
        _loss(loss.mean_of_last()),
        _loss(gap.mean_of_last()) if depth != "lm" else "",
        f"{accepted:.1%}" if accepted is not None else "",
        _loss(held_out),
    ]
    return f"{depth:<9}{cells[0]:>9}{cells[1]:>9}{cells[2]:>8}{cells[3]:>9}{cells[4]:>9}  {small_curve(loss)}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def small_curve(line: Curve, width: int = LINE) -> str:
    """A curve in one row: means of equal stretches of records; `!` where one of them was not finite."""
    text = []
    parts = [part for part in np.array_split(line.value, width) if len(part)]
    finite = [part[np.isfinite(part)] for part in parts]
    means = np.array([part.mean() if len(part) else np.nan for part in finite])
    if not np.isfinite(means).any():
        return "!" * len(parts)
    low, high = np.nanmin(means), np.nanmax(means)
    for part, mean in zip(parts, means, strict=True):
        level = 0 if high == low or not np.isfinite(mean) else round((mean - low) / (high - low) * (len(BARS) - 1))
        text.append("!" if not np.isfinite(part).all() else BARS[level])
    return "".join(text)


def _marks(log: RunLog) -> list[str]:
    found = [
        (line["time"], f"  {line['iteration']:>9,} {KINDS[line['kind']]}: {without_iteration(line.get('text', ''))}")
        for line in log.texts
        if line["kind"] in SIGNS_AND_FAULTS
    ]
    found += [
        (one.line["time"], f"  {one.line['iteration']:>9,} {interruption_text(one)}") for one in log.interruptions
    ]
    return [text for _, text in sorted(found)]
