"""Reports of real tiny runs: what the log holds for them, over a kill, a resume on another layout and a rollback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.errors import NumericsError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.run_log import open_log
from megatron_mtp.parallel.planner.stage_memory import predict_memory
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe
from megatron_mtp.report.charts import charts
from megatron_mtp.report.page import open_runs, page, write_report
from megatron_mtp.report.watch import screen
from tests.report.test_page import Page

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def tiny(folder: Path, steps: int = 20):
    cfg = get_recipe("tiny_dense")
    cfg.dist.device, cfg.dist.num_threads = "cpu", 1
    cfg.logger.log_dir = str(folder)
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "checkpoints")
    cfg.train.train_iters, cfg.checkpoint.save_interval = steps, 5
    cfg.validation.eval_interval = 10
    return cfg


def test_a_run_that_was_killed_and_resumed(tmp_path: Path):
    cfg = tiny(tmp_path / "run")
    cfg.train.exit_interval = 10
    pretrain(cfg, recipe="tiny_dense")
    path = tmp_path / "run" / "metrics.jsonl"
    assert [line["text"] for line in read_metrics(path, "end")] == ["left: train.exit_interval"]
    # The end of a killed process: steps that are not in the last checkpoint, and half a line.
    lines = path.read_text().splitlines(keepends=True)
    again = next(line for line in reversed(lines) if '"kind": "step"' in line).replace(
        '"iteration": 10', '"iteration": 11'
    )
    path.write_text("".join(line for line in lines if '"kind": "end"' not in line) + again + again[:100])
    assert "going on" in screen(open_log(path), time.time())[1]
    cfg.train.exit_interval = None
    pretrain(cfg, recipe="tiny_dense")

    runs = open_runs([tmp_path / "run"])
    found = Page(page(runs, charts(runs), time.time()))
    overview = {row[0]: row[1] for row in found.tables["The runs of this report"]}
    assert overview["state"] == "complete"
    assert overview["steps"] == "20 of 20"
    assert overview["restarts and rollbacks"] == "1"
    assert found.tables["Restarts and rollbacks"][1][3] == "1"
    last = read_metrics(path)[-1]
    assert overview["mtp_1 accepted, whole run"] == f"{last['mtp_1/accepted_over_run']:.5g}"
    kept = [step["mtp_1/accepted"] * step["mtp_1/num_targets"] for step in read_metrics(path)]
    counted = sum(step["mtp_1/num_targets"] for step in read_metrics(path))
    assert last["mtp_1/accepted_over_run"] == pytest.approx(sum(kept) / counted)
    losses = {line["label"]: line for line in found.data["charts"][0]["series"]}
    steps = read_metrics(path)
    assert losses["mtp_1"]["y"] == pytest.approx([step["mtp_1 loss"] for step in steps], rel=1e-5)
    assert found.data["places"][losses["lm, validation"]["x"]]["iteration"] == [10, 20]
    resolved = resolve(cfg.copy().finalize(1), 1)
    planned = predict_memory(resolved, resolved.layout, 0, is_cpu=True).total / 2**30
    memory = found.tables["Memory of one rank of each stage in GiB"][1]
    assert float(memory[6]) == pytest.approx(planned, rel=5e-3)
    assert 0.2 < float(memory[7]) < 64
    assert found.tables["Time of one step in ms"][1][0] == "run, planned for cpu"
    assert found.tables["Phases of the schedule"]
    assert write_report([tmp_path / "run"], tmp_path)


def test_a_run_that_stops_says_why(tmp_path: Path):
    cfg = tiny(tmp_path)
    cfg.train.on_spike, cfg.train.spike_window, cfg.train.spike_sigmas = "stop", 8, 1e-6
    with pytest.raises(NumericsError):
        pretrain(cfg)
    (end,) = read_metrics(tmp_path / "metrics.jsonl", "end")
    assert end["text"].startswith("ended by NumericsError: ")
    assert "ended by NumericsError" in screen(open_log(tmp_path), time.time())[1]
