"""Signals and clocks: a checkpoint at the step's end on every rank, and the documented exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_mtp import pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.gpt_step import forward_step
from megatron_mtp.training.guards import preemption
from tests.training.test_pretrain import tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
PROGRAM = ("-m", "megatron_mtp")
REPORTING = ("-m", "tests.training.guards.reporting_rank")
LEFT = re.compile(r"SIGTERM came after iteration (\d+); left after iteration (\d+) with a checkpoint, exit code (\d+)")
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "0",
]
AGENT = [sys.executable, "-m", "megatron_mtp.launch.agent", *TORCHRUN[3:]]


class SendSignal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_step_end(self, run, state, result):
        if state.iteration == self.step:
            os.kill(os.getpid(), self.number)


def saved(folder: Path) -> dict[int, str]:
    """Iteration -> reason of each checkpoint."""
    directory = RunDirectory(folder / "checkpoints")
    return {iteration: directory.read(iteration).reason for iteration in reversed(directory.iterations())}


def saving(folder: Path, **train: int):
    cfg = tiny(folder, **train)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "checkpoints")
    return cfg


def test_sigterm_saves_and_leaves_and_sigusr1_saves_and_stays(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    cfg = saving(tmp_path, train_iters=8)
    cfg.dist.preempted_exit_code = 17
    summary = pretrain(cfg, callbacks=[SendSignal(signal.SIGUSR1, 2), SendSignal(signal.SIGTERM, 5)])
    assert summary.exit_code == 17
    assert summary.state.iteration == 5
    assert saved(tmp_path) == {2: "SIGUSR1", 5: "SIGTERM"}
    assert signal.getsignal(signal.SIGTERM) is before
    summary = pretrain(cfg)
    assert (summary.exit_code, summary.state.iteration) == (0, 8)
    assert [step["iteration"] for step in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_a_signal_in_the_middle_of_a_step_lets_that_step_end_and_no_other(tmp_path: Path):
    def forward(context, iterator, model):
        calls.append(1)
        if len(calls) == 5 * micro_batches + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_step(context, iterator, model)

    calls: list[int] = []
    cfg = saving(tmp_path, train_iters=8)
    micro_batches = cfg.train.global_batch_size // cfg.train.micro_batch_size
    assert pretrain(cfg, forward).exit_code == 3
    assert len(calls) == 6 * micro_batches
    assert saved(tmp_path) == {6: "SIGTERM"}


def test_minutes_between_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock that each step moves on by 20 seconds."""
    clock = [0.0]
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Clock(Callback):
        def on_step_end(self, run, state, result):
            clock[0] += 20

    cfg = saving(tmp_path, train_iters=7)
    cfg.checkpoint.save_interval_mins, cfg.train.exit_duration_in_mins = 0.5, 1.9
    assert pretrain(cfg, callbacks=[Clock()]).exit_code == 0
    assert saved(tmp_path) == {2: "save_interval_mins", 4: "save_interval_mins", 6: "exit_duration_in_mins"}


def test_the_best_checkpoints_are_kept(tmp_path: Path):
    """The curve of a tiny model falls, so each evaluation is the best so far."""
    cfg = saving(tmp_path, train_iters=9)
    cfg.validation.eval_interval, cfg.validation.eval_iters = 2, 1
    cfg.checkpoint.keep_best, cfg.checkpoint.most_recent_k = 2, 1
    cfg.scheduler.lr_warmup_iters = 0
    pretrain(cfg)
    losses = {line["iteration"]: line["lm loss"] for line in read_metrics(tmp_path / "metrics.jsonl", "evaluation")}
    best = sorted(losses, key=losses.get)[:2]
    assert set(saved(tmp_path)) == {9, *best}
    directory = RunDirectory(tmp_path / "checkpoints")
    assert [directory.read(iteration).validation_loss for iteration in best] == [losses[i] for i in best]


def start(folder: Path, launcher: list[str], *options: str, program: Sequence[str] = PROGRAM) -> subprocess.Popen:
    arguments = ["dist.device=cpu", "dist.num_threads=1", "train.train_iters=100000", "validation.eval_iters=0"]
    arguments += [f"checkpoint.save={folder}/checkpoints", f"checkpoint.load={folder}/checkpoints"]
    arguments += [f"logger.log_dir={folder}", "logger.log_interval=1", *options]
    command = [*(launcher or [sys.executable]), *program, "pretrain", "tiny_dense", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["REPORT_FOLDER"] = str(folder)
    log = (folder / "log").open("wb")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 400
    while not (path.exists() and len(re.findall('"kind": "step"', path.read_text())) >= count):
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_the_leave(folder: Path) -> None:
    """One checkpoint, of the step in which the signal came or of the one after, and no step after it."""
    log = (folder / "log").read_text()
    came, left, code = map(int, LEFT.search(log).groups())
    assert code == 3
    assert came <= left <= came + 1
    assert RunDirectory(folder / "checkpoints").iterations() == [left]
    assert RunDirectory(folder / "checkpoints").read(left).reason == "SIGTERM"
    assert read_metrics(folder / "metrics.jsonl")[-1]["iteration"] == left


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        pytest.param([], (), id="one rank", marks=pytest.mark.slow),
        pytest.param([], ("--nproc", "2"), id="nproc"),
        pytest.param(AGENT, (), id="agent", marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_the_launcher(tmp_path: Path, launcher: list[str], options: tuple[str, ...]):
    process = start(tmp_path, launcher, *options)
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(300)
    log = (tmp_path / "log").read_text()
    assert code == 3, log[-3000:]
    assert "Traceback" not in log
    check_the_leave(tmp_path)


@pytest.mark.slow
def test_sigterm_to_plain_torchrun(tmp_path: Path):
    """The checkpoint is there and each rank ends with 3. torchrun itself ends with 1, whatever its ranks do."""
    process = start(tmp_path, TORCHRUN, program=REPORTING)
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 1
    assert [(tmp_path / f"exit_{rank}").read_text() for rank in range(2)] == ["3", "3"]
    check_the_leave(tmp_path)


@pytest.mark.slow
def test_sigterm_to_one_rank_of_plain_torchrun(tmp_path: Path):
    """Both ranks leave, and torchrun's report names their code."""
    process = start(tmp_path, TORCHRUN)
    wait_for_steps(tmp_path, 3, process)
    first = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "0")
    first.send_signal(signal.SIGTERM)
    assert process.wait(300) == 1
    assert re.findall(r"exitcode +: (\d+)", (tmp_path / "log").read_text())[-1] == "3"
    check_the_leave(tmp_path)
