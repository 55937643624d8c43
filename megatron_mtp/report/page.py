"""Writes a report: one HTML file that needs no network, and a PNG of each chart."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_mtp import __version__
from megatron_mtp.config.yaml_text import dump_yaml
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.run_log import RunLog, find_log, open_log
from megatron_mtp.report import tables
from megatron_mtp.report.charts import Chart, ReportRun, charts, page_data, summary
from megatron_mtp.report.marks import KINDS
from megatron_mtp.report.pictures import draw_pictures
from megatron_mtp.report.schedule import Picture, schedules

PARALLEL_BYTES = 32 * 2**20
"""From this size of all logs on they are read by processes of their own."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, with what stands in it from top to bottom."""

    id: str
    title: str
    text: str = ""
    tables: list[tables.TextTable] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    folded: list[dict[str, str]] = field(default_factory=list)


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Writes report.html and a PNG of each chart.

    Args:
        runs: folders or logs of runs, the one to look at first; see `open_log`.
        output: folder; made if it is missing.

    Returns:
        The files, the page first.

    Raises:
        DataError: a run has no log, or the log has no record.
        ConfigError: the folder cannot be written.
    """
    shown = open_runs(runs)
    found = charts(shown)
    text = page(shown, found, time.time())
    try:
        output.mkdir(parents=True, exist_ok=True)
        target = output / "report.html"
        target.write_text(text, encoding="utf-8")
        return [target, *draw_pictures(found, output)]
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be written: {error.strerror or error}. Name another folder."
        ) from error


def open_runs(runs: Sequence[Path]) -> list[ReportRun]:
    """The runs, each under a name of its own."""
    logs = read_logs(runs)
    return [ReportRun.of(name, log) for name, log in zip(names([log.place for log in logs]), logs, strict=True)]


def read_logs(runs: Sequence[Path]) -> list[RunLog]:
    """The logs of several runs; long ones are read side by side."""
    size = sum(find_log(run).stat().st_size for run in runs)
    if len(runs) == 1 or size < PARALLEL_BYTES:
        return [open_log(run) for run in runs]
    # Not forked: a process that imported torch has threads.
    with ProcessPoolExecutor(min(len(runs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(open_log, runs))


def names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths by which the runs differ."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{'/'.join(part[-1:])} ({number})" for number, part in enumerate(parts, start=1)]


def page(runs: Sequence[ReportRun], found: Sequence[Chart], now: float) -> str:
    """The page as HTML."""
    from jinja2 import Environment, select_autoescape  # only this command needs it

    template = Environment(autoescape=select_autoescape(default=True)).from_string(_asset("page.html"))
    # In a script element only "</" can end it.
    data = json.dumps(page_data(runs, found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.render(
        version=__version__,
        title=f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs compared",
        made=datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        source="From " + ", ".join(str(run.log.path) for run in runs) + ".",
        sections=sections(runs, now),
        charts=[_chart(chart) for chart in found],
        kinds=set(KINDS.values()),
        data=data,
        css=_asset("page.css"),
        js=_asset("page.js"),
        uplot_css=_asset("uplot/uPlot.min.css"),
        uplot_js=_asset("uplot/uPlot.iife.min.js"),
    )


def sections(runs: Sequence[ReportRun], now: float) -> list[Section]:
    """The parts of the page, in order; those with nothing to show are left out or say so."""
    signs, restarts = tables.signs(runs), tables.restarts(runs)
    memory, times, phases = tables.memory(runs), tables.step_times(runs), tables.phases_table(runs)
    found = [
        Section("overview", "Overview", tables=[tables.overview(runs, now)]),
        Section("curves", "Curves"),
        Section("signs", "Signs and faults", "" if signs.rows else "None was reported.", _filled(signs)),
        Section(
            "restarts", "Restarts", "" if restarts.rows else "The run has not been interrupted.", _filled(restarts)
        ),
    ]
    if phases.rows:
        found.append(Section("phases", "Phases", tables=[phases]))
    if memory.rows:
        text = (
            "Measured: on a GPU the most that its allocator gave to tensors; on a CPU the largest resident set of the "
            "process, with libraries and Python's objects, which the plan does not count."
        )
        found.append(Section("memory", "Memory", text, [memory]))
    pictures = schedules(runs)
    if times.rows or pictures:
        found.append(Section("schedule", "Step time and schedule", tables=_filled(times), pictures=pictures))
    found.append(_config_section(runs))
    return found


def _config_section(runs: Sequence[ReportRun]) -> Section:
    text, shown = "", []
    if len(runs) > 1:
        table = tables.differences(runs)
        text, shown = ("" if table.rows else "The runs have the same config."), _filled(table)
    folded = [
        {"title": f"Config of {run.name}", "text": dump_yaml(run.log.start.get("config", {}))}
        for run in runs
        if run.log.start.get("config")
    ]
    cards = [
        {"title": f"Start card of {run.name}", "text": line["text"]}
        for run in runs
        for line in run.log.texts[::-1]
        if line["kind"] == "start card"
    ]
    return Section("config", "Config", text, shown, folded=[*cards[: len(runs)], *folded])


def _filled(table: tables.TextTable) -> list[tables.TextTable]:
    return [table] if table.rows else []


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "key": chart.plot.key,
        "title": chart.plot.title,
        "unit": chart.plot.unit,
        "note": chart.plot.note,
        "summary": " ".join(summary(line) for line in chart.series),
        "table": tables.data_table(chart),
    }


def _asset(name: str) -> str:
    return files("megatron_mtp.report").joinpath(name).read_text(encoding="utf-8")
