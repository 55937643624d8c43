"""The page of a run, whatever its log looks like: complete, self-contained, and true to the log."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.run_log import open_log
from megatron_mtp.report.charts import charts
from megatron_mtp.report.curves import BUCKETS, Curve, reduced
from megatron_mtp.report.marks import marks
from megatron_mtp.report.page import names, open_runs, page, write_report
from megatron_mtp.report.traces import measured_step
from tests.report.logs import LOGS, LogWriter, long_log

pytestmark = pytest.mark.unit


class Page(HTMLParser):
    """A page: its ids, what refers to ids, its tables, and its JSON."""

    VOID = ("meta", "link", "input", "br", "rect", "line", "circle")

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.addresses: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = text
        self._open: list[str] = []
        self._cells: list[list[str]] = []
        self._caption = ""
        self._attributes: dict[str, str | None] = {}
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "id" in found:
            self.ids.append(str(found["id"]))
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += str(found.get(name) or "").split()
        for name in ("href", "src"):
            if name in found:
                self.addresses.append(str(found[name]))
        if tag == "tr":
            self._cells.append([])
        if tag in ("td", "th"):
            self._cells[-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self._open.pop() == tag, f"{tag} closes another element"
        if tag == "table":
            self.tables[self._caption], self._cells = self._cells, []

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self._cells[-1][-1] += data
        if self._open and self._open[-1] == "caption":
            self._caption = data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(re.search(r'id="data">(.*?)</script>', self.text, re.S)[1])


def report(*runs: Path) -> Page:
    shown = open_runs(runs)
    return Page(page(shown, charts(shown), time.time()))


@pytest.mark.parametrize("name", LOGS)
def test_a_page_is_whole_and_needs_no_network(tmp_path: Path, name: str):
    found = report(LOGS[name](tmp_path / "run").path)
    assert len(set(found.ids)) == len(found.ids)
    inside = [address.removeprefix("#") for address in found.addresses if address.startswith("#")]
    assert set(inside) | set(found.references) <= set(found.ids)
    assert [address for address in found.addresses if not address.startswith("#")] == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<img|<iframe", found.text)
    charts = [chart["key"] for chart in found.data["charts"]]
    assert bool(charts) == (name != "empty")
    assert {f"chart-{key}" for key in charts} <= set(found.ids)
    assert found.text.count('role="img"') == len(charts)


@pytest.mark.parametrize("name", LOGS)
def test_the_data_of_the_page_is_what_the_log_says(tmp_path: Path, name: str):
    path = LOGS[name](tmp_path / "run").path
    data, steps = report(path).data, read_metrics(path)
    lines = {line["label"]: line for chart in data["charts"] for line in chart["series"] if chart["key"] == "losses"}
    for label, metric in {"lm": "lm loss", "mtp_1": "mtp_1 loss"}.items():
        known = [(step["iteration"], step[metric]) for step in steps if metric in step]
        if not known:
            assert label not in lines
            continue
        places = data["places"][lines[label]["x"]]
        assert places["iteration"] == [iteration for iteration, _ in known]
        shown = [math.nan if value is None else value for value in lines[label]["y"]]
        expected = [value if math.isfinite(value) else math.nan for _, value in known]
        np.testing.assert_allclose(shown, expected, rtol=1e-5)
        bad = data["places"][lines[label]["bad"]]["iteration"] if "bad" in lines[label] else []
        assert bad == [iteration for iteration, value in known if not math.isfinite(value)]
        assert places["tokens"] == [64 * 128 * iteration for iteration, _ in known]
        np.testing.assert_allclose(places["flop"], np.array(places["tokens"]) * 0.4096e12 / 20480, rtol=1e-5)
        times = {step["iteration"]: step["perf/iteration_time_ms"] for step in steps}
        hours = np.cumsum([times[iteration] for iteration, _ in known]) / 3.6e6
        np.testing.assert_allclose(places["hours"], hours, rtol=1e-5)


def test_the_states_are_told_apart(tmp_path: Path):
    def state(name: str) -> str:
        found = report(LOGS[name](tmp_path / name / "run").path)
        return next(row[1] for row in found.tables["The runs of this report"] if row[0] == "state")

    assert state("killed_and_resumed") == "complete"
    assert state("rolled_back") == "left: SIGTERM"
    assert "probably stopped or killed" in state("going_on")
    now = LogWriter(tmp_path / "now", time.time() - 5).start().steps(1, 3)
    overview = report(now.path).tables["The runs of this report"]
    assert "going on: last record" in overview[1][1]


def test_restarts_faults_and_layouts_are_listed(tmp_path: Path):
    found = report(LOGS["killed_and_resumed"](tmp_path / "a" / "run").path)
    assert [row[0] for row in found.tables["Restarts and rollbacks"][1:]] == ["20", "40", "45"]
    assert found.tables["Restarts and rollbacks"][1][3] == "9"
    found = report(LOGS["rolled_back"](tmp_path / "b" / "run").path)
    assert [row[2] for row in found.tables["Restarts and rollbacks"][1:]] == ["rollback"]
    assert found.tables["Health signs and faults"][1][::2] == ["31", "fault"]
    assert [mark["kind"] for mark in found.data["runs"][0]["marks"]] == ["rollback", "fault"]
    found = report(LOGS["other_layout"](tmp_path / "c" / "run").path)
    assert "tp 2, pp 1, cp 1, ep 1, 2 processes -> tp 1, pp 4" in found.tables["Restarts and rollbacks"][1][4]
    memory = found.tables["Memory of one rank of each stage in GiB"]
    assert [row[-1] for row in memory[1:]] == ["1.5", "2", "3", "4"]


def test_runs_are_compared_field_by_field(tmp_path: Path):
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        config = {"optimizer": {"lr": lr, "clip_grad": 1.0}, "model": {"num_layers": 4}}
        LogWriter(tmp_path / name).start(config=config).steps(1, 20).evaluation(20)
    found = report(tmp_path / "a", tmp_path / "b")
    assert found.tables["Config fields that differ"] == [["field", "a", "b"], ["optimizer.lr", "0.001", "0.002"]]
    keys = [chart["key"] for chart in found.data["charts"]]
    assert {"losses_lm", "losses_mtp_1", "losses_mtp_2", "gap_mtp_1"} <= set(keys)
    main_loss = next(chart for chart in found.data["charts"] if chart["key"] == "losses_lm")
    assert [line["label"] for line in main_loss["series"]] == [
        "a: lm",
        "a: lm, validation",
        "b: lm",
        "b: lm, validation",
    ]
    assert {line["color"] for line in main_loss["series"]} == {0, 1}


def test_runs_of_different_depths_and_records_are_compared(tmp_path: Path):
    found = report(*(LOGS[name](tmp_path / name).path for name in LOGS))
    assert len(found.data["runs"]) == len(LOGS)
    assert len(found.tables["The runs of this report"][0]) == len(LOGS) + 1


def test_planned_beside_measured(tmp_path: Path):
    stage = {"weights": 2**30, "gradients": 2**30, "optimizer": 2**29, "activations": 0, "workspace": 2**29}
    schedule = {
        "num_microbatches": 8,
        "sends_block": False,
        "chunks_ms": [[[1.0, 2.0]], [[1.5, 2.5]]],
        "message_ms": [0.1],
        "shapes_ms": None,
    }
    times = {"pipeline_ms": 50.0, "update_ms": 5.0, "reduce_ms": 0.0, "other_ms": 1.0}
    plan = {"machine": "h100", "memory": [stage, stage], "step_ms": times, "schedule": schedule}
    extra = {"plan": plan, "milestones": [{"step": 5, "what": "warmup ends"}, {"step": 99, "what": "decay"}]}
    log = LogWriter(tmp_path / "run").start(extra=extra)
    log.steps(1, 20, **{"perf/peak_memory_gib_stage_0": 3.25, "perf/peak_memory_gib_stage_1": 2.5})
    found = report(log.path)
    memory = found.tables["Memory of one rank of each stage in GiB"]
    assert memory[1] == ["run, stage 0", "1", "1", "0.5", "0", "0.5", "3", "3.25"]
    assert found.tables["Time of one step in ms"][1][:6] == ["run, planned for h100", "50", "5", "0", "1", "56"]
    assert found.text.count('class="schedule"') == 1
    assert "drawn with 4 of 8 micro-batches" in found.text
    assert [mark["text"] for mark in found.data["runs"][0]["marks"]] == ["warmup ends"]
    assert len(found.tables["Phases of the schedule"]) == 3


def test_the_schedule_of_traces_is_drawn(tmp_path: Path):
    def trace(rank: int, base_ms: float, *calls: tuple[str, float, float]) -> None:
        events = [{"cat": "user_annotation", "name": name, "ts": ts, "dur": dur} for name, ts, dur in calls]
        content = {"baseTimeNanoseconds": base_ms * 1e6, "traceEvents": [{"ph": "M"}, *events]}
        (tmp_path / "traces" / f"rank{rank}.1.pt.trace.json").write_text(json.dumps(content))

    (tmp_path / "traces").mkdir()
    first = "stage 0 chunk 0 forward, micro-batch 0"
    trace(0, 5.0, (first, 0, 1000), (first, 9000, 1000), ("stage 0 chunk 0 backward, micro-batch 0", 12000, 3000))
    trace(1, 4.0, ("stage 1 chunk 0 forward, micro-batch 0", 11000, 1500), ("depth 1 forward", 11000, 5))
    (tmp_path / "traces" / "rank2.1.pt.trace.json").write_text('{"cut off')
    events = sorted(measured_step(tmp_path / "traces"), key=lambda event: event.start_ms)
    assert [(e.pp_rank, e.is_forward, round(e.start_ms, 3), round(e.end_ms, 3)) for e in events] == [
        (0, True, 0, 1),
        (1, True, 1, 2.5),
        (0, False, 3, 6),
    ]
    config = {"profiling": {"profile_dir": str(tmp_path / "traces")}}
    found = report(LogWriter(tmp_path / "run").start(config=config).steps(1, 3).path)
    assert "schedule measured in the last step" in found.text
    assert found.text.count('class="schedule"') == 1


def test_a_log_of_few_metrics_and_one_of_nothing_are_shown(tmp_path: Path):
    log = LogWriter(tmp_path / "few")
    for iteration in (1, 2, 3):
        log.line("step", iteration, **{"lm loss": 4.0 - iteration})
    found = report(log.path)
    assert [chart["key"] for chart in found.data["charts"]] == ["losses"]
    assert found.data["places"][found.data["charts"][0]["series"][0]["x"]] == {"iteration": [1, 2, 3]}
    assert [axis["key"] for axis in found.data["axes"]] == ["iteration"]
    nothing = report(LogWriter(tmp_path / "nothing").path)
    assert not nothing.data["charts"]


def test_signs_that_begin_and_end_are_in_the_table_and_marked_in_the_curves(tmp_path: Path):
    log = LogWriter(tmp_path / "run").start().steps(1, 40)
    for kind, step in (("warning", 20), ("recovery", 30), ("autotune", 35)):
        log.line(kind, step, text=f"iteration {step}: text of {kind}")
    found = report(log.path)
    rows = found.tables["Health signs and faults"][1:]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["20", "sign", "text of warning"],
        ["30", "recovery", "text of recovery"],
        ["35", "autotune", "text of autotune"],
    ]
    kinds = [mark.kind for mark in marks(open_log(log.path))]
    assert kinds == ["sign", "recovery", "autotune"]


def test_text_of_a_run_cannot_break_the_page(tmp_path: Path):
    nasty = "</script><script>alert(1)</script> <b>&"
    log = LogWriter(tmp_path / "run").start(recipe=nasty).steps(1, 3).line("warning", 2, text=nasty)
    found = report(log.path)
    assert "<script>alert" not in found.text
    assert found.tables["Health signs and faults"][1][3] == nasty


def test_a_reduced_curve_keeps_its_extremes_and_its_mean():
    draw = np.random.default_rng(0)
    value = draw.normal(size=10_007)
    value[1234], value[5678], value[42] = 100.0, -100.0, np.nan
    short = reduced(Curve(np.arange(1.0, len(value) + 1), value))
    assert len(short.mean) == BUCKETS
    assert np.nanmax(short.high) == 100.0
    assert np.nanmin(short.low) == -100.0
    assert short.bad.tolist() == [43]
    assert short.iteration[-1] == len(value)
    widths = np.diff(short.iteration, prepend=0)
    widths[np.searchsorted(short.iteration, 43)] -= 1
    assert np.sum(short.mean * widths) == pytest.approx(np.nansum(value))


def test_a_stretch_without_a_finite_value_is_a_gap():
    value = np.ones(4000)
    value[1000:2000] = np.inf
    short = reduced(Curve(np.arange(1.0, 4001), value))
    assert 99 <= np.isnan(short.mean).sum() <= 100
    assert len(short.bad) == 1000


def test_names_are_the_shortest_ends_that_differ(tmp_path: Path):
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names([Path("/x/1/logs"), Path("/x/2/logs")]) == ["1/logs", "2/logs"]
    assert names([Path("/x/a"), Path("/x/a")]) == ["a (1)", "a (2)"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    LogWriter(tmp_path / "run").start().steps(1, 5)
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path / "run")])
    assert not left.value.code
    assert "report.html: " in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path / "none")])
    assert left.value.code == 2
    assert "no log of a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Name another folder"):
        write_report([tmp_path / "run"], tmp_path / "run" / "metrics.jsonl" / "report")


@pytest.mark.slow
def test_a_long_comparison_is_small_and_quick(tmp_path: Path):
    """100,000 steps of four runs. The time is that of the processor: another test may be running beside this one."""
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        long_log(tmp_path / str(number) / "metrics.jsonl", 100_000, number)
    runs = [str(tmp_path / str(number)) for number in range(4)]
    command = [
        sys.executable,
        "-m",
        "megatron_mtp",
        "report",
        runs[0],
        *(w for r in runs[1:] for w in ("--compare", r)),
    ]
    started_s = time.monotonic()
    subprocess.run([*command, "--output", str(tmp_path)], check=True, timeout=120)
    assert time.monotonic() - started_s < 20  # 10 s on two free cores
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    losses = Page((tmp_path / "report.html").read_text()).data["charts"][0]["series"]
    assert [len(line["y"]) for line in losses] == [BUCKETS] * 4
