"""Four phases at several layouts, one that changes at a border: killed at random, stopped, and left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import ConfigContainer
from megatron_mtp.observe.jsonl import read_metrics
from tests.training.test_phases import config, curves, files_of, state_of

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    "pp2_then_cp2": (
        2,
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 1, "context_parallel_size": 2},
    ),
}
"""Name -> processes, the layout from the start on, and that of the phase `long`."""


def make(folder: Path, layout: str, name: str) -> tuple[ConfigContainer, list[str]]:
    """The config of a run, and the command that starts it."""
    processes, first, later = LAYOUTS[layout]
    cfg = config(folder, f"{layout}_{name}")
    cfg.model.update(hidden_dropout=0.0, **first)
    cfg.phases["long"]["model"] = cfg.phases["long"]["model"] | later
    cfg.checkpoint.save_interval = 2
    file = folder / f"{layout}_{name}.yaml"
    file.write_text(cfg.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_mla_moe", "--config", str(file)]
    return cfg, command + (["--nproc", str(processes)] if processes > 1 else [])


def start(command: list[str], log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen([*command, *overrides], stdout=output, stderr=output, start_new_session=True)


def run(command: list[str], log: Path, *overrides: str) -> None:
    assert start(command, log, *overrides).wait(900) == 0, log.read_text()[-3000:]


def num_steps(cfg: ConfigContainer) -> int:
    path = Path(cfg.logger.log_dir) / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def run_killed(cfg: ConfigContainer, command: list[str], log: Path, rng: random.Random) -> int:
    """Kills all processes at once after some steps of each start, then lets the run end. Returns the kills."""
    for done in range(KILLS):
        before, wanted = num_steps(cfg), rng.randrange(1, 4)
        process = start(command, log)
        while num_steps(cfg) < before + wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()[-3000:]
            return done
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(command, log)
    return KILLS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_one_run_however_often_it_was_stopped_or_killed(tmp_path_factory: pytest.TempPathFactory, layout: str):
    folder = tmp_path_factory.mktemp("phases")
    whole, command = make(folder, layout, "whole")
    run(command, folder / "whole.txt")
    last = whole.train.train_iters
    stopped, command = make(folder, layout, "stopped")
    for border in [phase["iteration"] for phase in state_of(whole, last).phases]:
        run(command, folder / "stopped.txt", f"train.exit_interval={border}")
    run(command, folder / "stopped.txt")
    killed, command = make(folder, layout, "killed")
    assert run_killed(killed, command, folder / "killed.txt", random.Random(7)) >= 3
    for other in (stopped, killed):
        assert curves(other) == curves(whole)
        assert files_of(other, last) == files_of(whole, last)
        assert state_of(other, last).phases == state_of(whole, last).phases
    if layout != "one":
        one, command = make(folder, "one", "whole")
        run(command, folder / "one.txt")
        names = ("lm loss", "mtp_1 loss", "mtp_2 loss", "grad-norm", "learning-rate", "consumed-tokens")
        for ours, theirs in zip(curves(whole), curves(one), strict=True):
            expected = {name: theirs[name] for name in names if name in theirs}
            assert {name: ours.get(name) for name in expected} == pytest.approx(expected, rel=1e-5), ours
    texts = [line["text"] for line in read_metrics(Path(killed.logger.log_dir) / "metrics.jsonl", "phase")]
    assert len(texts) == len(whole.phases)
