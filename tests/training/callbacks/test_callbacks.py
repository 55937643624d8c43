"""Callbacks: metrics in every record, state in the checkpoint, a stop, health signs, and the built-in ones."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mtp import pretrain
from megatron_mtp.errors import ConfigError, ForwardStepError, UnsupportedError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.trends import Window
from megatron_mtp.training import gpt_step
from megatron_mtp.training.callbacks import Callback, max_over_ranks, mean_over_ranks
from megatron_mtp.training.callbacks.events import call_event
from tests.harness.ranks import Ranks
from tests.training.test_pretrain import tiny

pytestmark = pytest.mark.dist


class TokensSeen(Callback):
    """Counts tokens over all sessions of a run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.closed = 0

    def on_step_end(self, run: Any, state: Any, result: Any) -> dict[str, float]:
        self.tokens += int(result.depth_counts[0])
        return {"data/targets": self.tokens}

    def on_evaluation(self, run: Any, state: Any, results: Any) -> dict[str, float]:
        return {"data/targets_at_evaluation": self.tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]

    def close(self) -> None:
        self.closed += 1


class StopAfter(Callback):
    """Asks to stop after some steps."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        if state.iteration == self.iteration:
            run.request_stop("the target was reached")


def short(folder: Path, **train: int):
    cfg = tiny(folder, train_iters=4, **train)
    cfg.model.num_layers, cfg.model.mtp_num_layers = 2, 1
    cfg.validation.eval_iters = 1
    return cfg


def test_a_metric_reaches_every_record_and_survives_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    cfg = short(tmp_path / "log")
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    cfg.logger.tensorboard_dir = str(tmp_path / "tb")
    stopped = pretrain(cfg, callbacks=[TokensSeen(), StopAfter(2)])
    assert (stopped.state.iteration, stopped.exit_code) == (2, 0)
    assert stopped.stop_reason == "the target was reached"
    counter = TokensSeen()
    done = pretrain(cfg, callbacks=[counter])
    assert (done.state.iteration, done.stop_reason, counter.closed) == (4, None, 1)
    per_step = cfg.train.global_batch_size * cfg.model.seq_length
    expected = [per_step * step for step in (1, 2, 3, 4)]
    assert [step["data/targets"] for step in read_metrics(tmp_path / "log" / "metrics.jsonl")] == expected
    evaluations = read_metrics(tmp_path / "log" / "metrics.jsonl", "evaluation")
    assert evaluations[-1]["data/targets_at_evaluation"] == expected[-1]
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "elapsed time" in line]
    assert [f"data/targets: {value}" in line for value, line in zip(expected, lines, strict=True)] == [True] * 4
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("data/targets")] == expected


def test_state_of_a_callback_that_is_gone_is_kept(tmp_path: Path):
    cfg = short(tmp_path / "log")
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    pretrain(cfg, callbacks=[TokensSeen(), StopAfter(1)])
    pretrain(cfg, callbacks=[StopAfter(2)])
    kept = json.loads((tmp_path / "run" / "iter_0000002" / "train_state.json").read_text())
    assert kept["train"]["callbacks"] == {"TokensSeen": {"tokens": cfg.train.global_batch_size * cfg.model.seq_length}}


def test_two_callbacks_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="TokensSeen is given more than once"):
        pretrain(short(tmp_path), callbacks=[TokensSeen(), TokensSeen()])


def reduced() -> list[float | None]:
    """Means and maxima over two ranks, of which the second one lacks some values."""
    rank, run = dist.get_rank(), SimpleNamespace(device=SimpleNamespace(torch_device=torch.device("cpu")))
    mine, only_first = (1.0, 4.0)[rank], 3.0 if rank == 0 else None
    return [
        mean_over_ranks(run, mine),
        mean_over_ranks(run, mine, weight=(3, 1)[rank]),
        mean_over_ranks(run, only_first),
        mean_over_ranks(run, None),
        max_over_ranks(run, -mine),
        max_over_ranks(run, only_first),
        max_over_ranks(run, None),
    ]


def test_reductions_over_ranks(ranks: Ranks):
    assert ranks(2).run(reduced) == [[2.5, 1.75, 3.0, None, -1.0, 3.0, None]] * 2


class Returns(Callback):
    """Returns one metric from one event."""

    def __init__(self, event: str, metric: str):
        self._metric = {metric: 0.0}
        setattr(self, event, lambda *_: self._metric)


@pytest.mark.parametrize(
    ("event", "metric"),
    [
        ("on_step_end", "lm loss"),
        ("on_step_end", "num-zeros"),  # this run counts none
        ("on_step_end", "consumed-tokens"),
        ("on_step_end", "mtp_1/accepted"),
        ("on_step_end", "iteration"),
        ("on_evaluation", "lm loss ppl"),
    ],
)
def test_a_metric_with_a_name_that_is_taken_ends_the_first_step(tmp_path: Path, event: str, metric: str):
    with pytest.raises(ConfigError, match=f"callbacks: Returns.{event} returns '{metric}'"):
        pretrain(short(tmp_path), callbacks=[Returns(event, metric)])
    steps, evaluations = (read_metrics(tmp_path / "metrics.jsonl", kind) for kind in ("step", "evaluation"))
    assert (len(steps), len(evaluations)) == ((0, 0) if event == "on_step_end" else (4, 1))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "on_step_end returns a list: return a dict"),
        ({"my/x": "high"}, "returns 'my/x' = a str: must be a number"),
        ({"my/x": torch.ones(())}, r"returns 'my/x' = a Tensor: must be a number; of a tensor, tensor.item\(\)"),
    ],
)
def test_what_is_no_number_is_refused(returned: Any, message: str):
    class Returned(Callback):
        def on_step_end(self, run: Any, state: Any, result: Any) -> Any:
            return returned

    with pytest.raises(ConfigError, match=message):
        call_event([Returned()], "on_step_end", None, None, None)


def test_numbers_of_every_kind_are_recorded_and_none_is_left_out():
    class Returned(Callback):
        def on_step_end(self, run: Any, state: Any, result: Any) -> Any:
            return {"a": 1, "b": np.float32(0.5), "c": None, "d": np.int64(7)}

    metrics = call_event([Returned()], "on_step_end", None, None, None)
    assert json.dumps(metrics) == '{"a": 1, "b": 0.5, "d": 7.0}'


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        (RuntimeError("in the evaluation"), RuntimeError, "in the evaluation"),
        (SystemExit(0), ConfigError, r"Fails.on_evaluation calls sys.exit\(0\).*Call run.request_stop"),
    ],
    ids=["error", "exit"],
)
def test_an_evaluation_is_recorded_though_a_callback_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], end: BaseException, kind: type[Exception], message: str
):
    class Fails(Callback):
        def on_evaluation(self, run: Any, state: Any, results: Any) -> None:
            raise end

    cfg = short(tmp_path)
    cfg.validation.eval_interval = 2
    with pytest.raises(kind, match=message):
        pretrain(cfg, callbacks=[Fails()])
    (evaluation,) = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert (evaluation["iteration"], evaluation["lm loss"] > 0) == (2, True)
    assert "validation loss at iteration 2 | lm loss value: " in capfd.readouterr().out


def test_results_that_nothing_would_log_are_refused_by_name(tmp_path: Path):
    def forward_step(context: Any, iterator: Any, model: Any) -> Any:
        total, loss = gpt_step.forward_step(context, iterator, model)

        def with_entropy(total: Any) -> Any:
            scaled, count, results = loss(total)
            return scaled, count, results | {"entropy": total}

        return total, with_entropy

    with pytest.raises(ForwardStepError, match=r"holds 'sums', 'acceptance', 'entropy'; it must hold"):
        pretrain(short(tmp_path), forward_step)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_two_callbacks_cannot_return_one_metric(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Returns.on_step_end returns 'my/rate'"):
        pretrain(short(tmp_path), callbacks=[Returns("on_step_end", "my/rate"), Returns("on_step_end", "my/rate")])


def test_a_sign_of_a_callback_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    class Watch(Callback):
        def health_signs(self) -> dict[str, Any]:
            def high(history: Sequence[Window], now: Window) -> str | None:
                return "the learning rate was logged" if "learning-rate" in now.metrics else None

            return {"learning rate": high}

    cfg = short(tmp_path)
    cfg.train.train_iters = 20
    pretrain(cfg, callbacks=[Watch()])
    assert "iteration 20: the learning rate was logged" in "".join(capfd.readouterr())


def test_what_a_config_asks_for_is_made_by_pretrain(tmp_path: Path):
    cfg = short(tmp_path)
    cfg.validation.draft_prompts = 2
    pretrain(cfg)
    (evaluation,) = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert evaluation["drafting/tokens_per_pass"] >= 1
    cfg.model.mtp_num_layers = 0
    with pytest.raises(UnsupportedError, match=r"validation.draft_prompts = 2: drafts"):
        pretrain(cfg)


def test_the_collector_runs_again_after_a_run(tmp_path: Path):
    seen = []

    class Look(Callback):
        def on_step_end(self, run: Any, state: Any, result: Any) -> None:
            seen.append(gc.isenabled())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        pretrain(short(tmp_path), callbacks=[Look()])
    assert (seen, gc.isenabled()) == ([False], True)


def test_a_resume_keeps_the_windows_of_the_signs_and_shows_the_totals(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seen: list[int] = []

    class Watch(Callback):
        def health_signs(self) -> dict[str, Any]:
            def windows(history: Sequence[Window], now: Window) -> str | None:
                return seen.append(len(history))

            return {"windows": windows}

    cfg = short(tmp_path / "log")
    cfg.model.seq_length, cfg.train.train_iters, cfg.validation.eval_iters = 16, 45, 0
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    pretrain(cfg, callbacks=[Watch(), StopAfter(25)])
    assert seen == [0, 1]
    with caplog.at_level("INFO", logger="megatron_mtp.training.pretrain"):
        done = pretrain(cfg, callbacks=[Watch()])
    assert seen == [0, 1, 1, 2], "the window of step 30 begins before the stop, as without it"
    _, so_far, total = (text for text in caplog.messages if text.startswith(("so far: ", "in total: ")))
    assert so_far.startswith("so far: 25 iterations, ")
    assert total.startswith("in total: 45 iterations, ")
    hits, valid = (done.state.acceptance[name][0] for name in ("chain_hits", "chain_valid"))
    assert f"mtp_1 accepted {100 * hits / valid:.1f} %" in total
    assert f"{done.state.floating_point_operations:.3g} FLOPs" in total
