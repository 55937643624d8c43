"""SIGTERM and SIGUSR1 within an evaluation are obeyed before its next batch, and the curve of the run is the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import ConfigContainer, pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.cli.main import main
from megatron_mtp.errors import StoppedEvaluationError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training.gpt_step import forward_step
from megatron_mtp.training.step import Engine
from tests.harness.models import small_config
from tests.harness.ranks import Ranks
from tests.harness.runs import opened
from tests.training.test_pretrain import tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
BATCH = 2
"""Micro-batches of an evaluation batch."""
WHOLE = 4 * BATCH
"""Micro-batches of an evaluation."""


def config(folder: Path, **validation: Any) -> ConfigContainer:
    """Six steps, each second one followed by an evaluation of four batches. The curve falls: each loss is the best."""
    cfg = tiny(folder, train_iters=6, global_batch_size=4, micro_batch_size=2)
    cfg.model.update(num_layers=1, mtp_num_layers=1)
    cfg.scheduler.lr_warmup_iters = 0
    cfg.validation.update(eval_interval=2, eval_iters=4, **validation)
    cfg.checkpoint.update(save=str(folder / "run"), load=str(folder / "run"), keep_best=1, most_recent_k=-1)
    return cfg


def signalled(number: int, call: int) -> tuple[list[int], Callable[..., Any]]:
    """A forward step that sends this process a signal in the n-th micro-batch of the evaluations, which it counts."""
    calls: list[int] = []

    def forward(context, iterator, model):
        if not model.training:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return forward_step(context, iterator, model)

    return calls, forward


def records(folder: Path) -> list[dict[str, Any]]:
    """Metrics of all steps and evaluations, without those that clocks give."""
    lines = [line for kind in ("step", "evaluation") for line in read_metrics(folder / "metrics.jsonl", kind)]
    clocks = ("time", "perf/", "checkpoint/")
    return [{name: value for name, value in line.items() if not name.startswith(clocks)} for line in lines]


def losses(folder: Path) -> dict[int, Any]:
    """Iteration -> losses in its manifest."""
    directory = RunDirectory(folder / "run")
    return {iteration: directory.read(iteration).validation_losses for iteration in directory.iterations()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, pretrain(config(folder))


def assert_as_undisturbed(folder: Path, summary: Any, undisturbed: tuple[Path, Any]) -> None:
    expected, other = undisturbed
    assert records(folder) == records(expected)
    state, wanted = summary.state, other.state
    assert (state.iteration, state.best_validation_loss) == (wanted.iteration, wanted.best_validation_loss)
    assert losses(folder) == losses(expected)
    assert RunDirectory(folder / "run").named("best") == RunDirectory(expected / "run").named("best")


def test_sigterm_ends_an_evaluation_and_a_resume_repeats_it(
    tmp_path: Path, undisturbed: tuple[Path, Any], capfd: pytest.CaptureFixture[str]
):
    calls, forward = signalled(signal.SIGTERM, WHOLE + BATCH + 1)
    cut = pretrain(config(tmp_path), forward)
    assert (cut.exit_code, cut.stop_reason, cut.state.iteration) == (3, "SIGTERM", 4)
    assert len(calls) == WHOLE + 2 * BATCH, "the batch of the signal was the last one"
    said = "iteration 4: SIGTERM: the evaluation stops (validation, 2 of 4 batches done). A resume repeats it."
    assert said in "".join(capfd.readouterr())
    directory = RunDirectory(tmp_path / "run")
    assert (directory.read(4).reason, directory.read(4).validation_losses) == ("SIGTERM", {})
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl", "evaluation")] == [2]
    done = pretrain(config(tmp_path))
    assert done.exit_code == 0
    assert_as_undisturbed(tmp_path, done, undisturbed)


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigusr1_saves_within_an_evaluation_which_goes_on(
    tmp_path: Path, undisturbed: tuple[Path, Any], async_save: bool
):
    cfg = config(tmp_path)
    cfg.checkpoint.async_save = async_save
    calls, forward = signalled(signal.SIGUSR1, WHOLE + 1)
    done = pretrain(cfg, forward)
    assert len(calls) == 3 * WHOLE
    assert RunDirectory(tmp_path / "run").read(4).reason == "SIGUSR1"
    assert_as_undisturbed(tmp_path, done, undisturbed)
    cfg.checkpoint.load = f"{tmp_path}/run@4"  # as after a crash in the evaluation
    cfg.checkpoint.save = str(tmp_path / "other")
    again = pretrain(cfg)
    assert again.state.best_validation_loss == done.state.best_validation_loss
    assert losses(tmp_path)[6] == RunDirectory(tmp_path / "other").read(6).validation_losses


@pytest.mark.slow
def test_a_changed_schedule_decides_whether_the_evaluation_is_repeated(tmp_path: Path):
    _, forward = signalled(signal.SIGTERM, 1)
    assert pretrain(config(tmp_path), forward).state.iteration == 2
    cfg = config(tmp_path)
    cfg.validation.eval_interval = 5
    pretrain(cfg)
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl", "evaluation")] == [5, 6]


@pytest.mark.parametrize(
    ("call", "iteration"),
    [pytest.param(1, 0, id="at the start", marks=pytest.mark.slow), pytest.param(WHOLE + 1, 6, id="at the end")],
)
def test_the_first_and_the_last_evaluation(tmp_path: Path, call: int, iteration: int):
    def cfg() -> ConfigContainer:
        return config(tmp_path, eval_at_start=True, eval_at_end=True)

    made = cfg()
    made.validation.eval_interval = None
    _, forward = signalled(signal.SIGTERM, call)
    cut = pretrain(made, forward)
    assert (cut.exit_code, cut.state.iteration) == (3, iteration)
    assert RunDirectory(tmp_path / "run").iterations()[0] == iteration
    done = pretrain(made)
    assert (done.exit_code, done.state.iteration) == (0, 6)
    evaluations = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert [line["iteration"] for line in evaluations] == [0, 6]
    assert losses(tmp_path)[6]["validation/lm loss"] == evaluations[-1]["lm loss"]


def stop_on_rank_1(recipe: str) -> list[Any]:
    """What each rank sees of an evaluation in which rank 1 alone gets SIGUSR1 and then SIGTERM."""
    import torch.distributed as dist

    from megatron_mtp.training.evaluation import BetweenBatches, evaluate
    from megatron_mtp.training.guards.preemption import SignalWatch

    cfg = small_config(recipe, ("validation.eval_iters=5", "model.pipeline_model_parallel_size=2"), 2)
    seen: list[Any] = []
    with opened(cfg) as run, SignalWatch() as signals:
        plain = run.engine.forward_step

        def forward(*arguments):
            seen.append("batch")
            if dist.get_rank() == 1 and len(set(seen)) <= 2:
                os.kill(os.getpid(), signal.SIGTERM if "saved" in seen else signal.SIGUSR1)
            return plain(*arguments)

        object.__setattr__(run.engine, "forward_step", forward)
        try:
            evaluate(run.engine, run.data, 1.0, between=BetweenBatches(signals, lambda: seen.append("saved"), print))
        except StoppedEvaluationError as error:
            seen.append(str(error))
    return [item for item in seen if item != "batch"]


def test_all_ranks_stop_before_the_same_batch(ranks: Ranks):
    said = "SIGTERM: the evaluation stops (validation, 2 of 5 batches done)."
    assert ranks(2).run(stop_on_rank_1, "tiny_dense") == [["saved", said]] * 2


def test_a_long_evaluation_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """By a clock that each batch moves on by 25 seconds."""
    from types import SimpleNamespace

    from megatron_mtp.observe import progress

    clock = [0.0]
    evaluate = Engine.evaluate

    def slow(*arguments):
        clock[0] += 25
        return evaluate(*arguments)

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Engine, "evaluate", slow)
    cfg = config(tmp_path)
    cfg.train.train_iters, cfg.validation.eval_iters = 2, 6
    with caplog.at_level("INFO", logger="megatron_mtp.training.loop"):
        pretrain(cfg)
    assert [message for message in caplog.messages if "batches" in message and "left" in message] == [
        "evaluation of validation: 1 of 6 batches, about 0:02:05 left",
        "evaluation of validation: 4 of 6 batches, about 0:00:50 left",
    ]


def test_the_command_ends_with_143(
    undisturbed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    evaluate, calls = Engine.evaluate, []

    def interrupted(*arguments):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGUSR1 if len(calls) == 1 else signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(Engine, "evaluate", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(undisturbed[0] / "run"), "dist.device=cpu", "--json"])
    shown = capsys.readouterr()
    assert end.value.code == 143
    assert len(calls) == 2
    assert "megatron-mtp: SIGTERM: the evaluation stops (validation, 2 of 4 batches done)." in shown.err
    assert "SIGUSR1: an evaluation has nothing to save." in shown.err
    assert "losses" not in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_a_real_signal_to_two_ranks(undisturbed: tuple[Path, Any], tmp_path: Path, command: str):
    """An evaluation that would take hours; the launcher gets the signal."""
    sizes = ["validation.eval_iters=100000", "dist.device=cpu", "dist.num_threads=1"]
    arguments = ["evaluate", str(undisturbed[0] / "run"), "--nproc", "2", *sizes]
    if command == "pretrain":
        arguments = ["pretrain", "tiny_dense", "--nproc", "2", *sizes, "validation.eval_interval=2"]
        arguments += [f"checkpoint.save={tmp_path}/run", f"logger.log_dir={tmp_path}"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "megatron_mtp", *arguments], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while not re.search(r"evaluation of validation: \d+ of 100,000 batches", (tmp_path / "log").read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == (3 if command == "pretrain" else 143)
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert re.search(r"SIGTERM: the evaluation stops \(validation, [\d,]+ of 100,000 batches done\)", text)
    assert "Traceback" not in text
    if command == "pretrain":
        assert RunDirectory(tmp_path / "run").read(2).reason == "SIGTERM"
