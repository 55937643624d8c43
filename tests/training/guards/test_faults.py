"""Bad numbers put into a run: what is said of them, and what each policy makes of the step."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import pretrain
from megatron_mtp.config.sections import TrainConfig
from megatron_mtp.errors import NumericsError
from megatron_mtp.launch.local import run_ranks
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training import gpt_step
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.guards.faults import Fault, FaultWatch, decide
from megatron_mtp.training.state import TrainState
from tests.harness.runs import call_before_each_batch
from tests.training.test_pretrain import tiny

SLOW = pytest.mark.slow
BAD_SAMPLE_STEP = 4
NAMES = ["lm loss", "mtp_1 loss", "mtp_2 loss"]


class Injection(Callback):
    """Spoils one step: `forward_step` adds a value to one depth's sum, the callback multiplies a gradient.

    The step is recognised by its data, like a real bad batch: a rollback that skips the batch does not meet it again.
    """

    def __init__(self, depth: int | None, value: float = math.nan, steps: tuple[int, ...] = (BAD_SAMPLE_STEP,)):
        self.depth, self.value, self.steps, self.batch = depth, value, steps, None

    def on_train_start(self, run: Any, state: Any) -> None:
        engine = run.engine
        self.batch_size = run.cfg.train.global_batch_size
        call_before_each_batch(run.data, lambda batch: setattr(self, "batch", batch.step + 1))
        if self.depth is None:
            weight = dict(engine.chunks[0].named_parameters())[self._name(engine)]
            weight.register_hook(lambda gradient: gradient * (self.value if self.is_bad else 1.0))

    @staticmethod
    def _name(engine: Any) -> str:
        return next(name for name, _ in engine.chunks[0].named_parameters() if name.endswith("input_layernorm.weight"))

    @property
    def is_bad(self) -> bool:
        return self.batch in self.steps

    def forward_step(self, context: Any, iterator: Any, model: Any):
        total, loss = gpt_step.forward_step(context, iterator, model)
        if self.depth is None or not self.is_bad:
            return total, loss
        batch, output = loss.args
        sums = output.sums.clone()
        sums[self.depth] += self.value
        return total, partial(context.loss_function, batch, replace(output, sums=sums))


def run(folder: Path, injection: Injection, steps: int = 8, **train: Any):
    cfg = tiny(folder, train_iters=steps, **train)
    cfg.validation.eval_iters = 0
    cfg.dataset.prefetch_steps = 0  # the injection must know which batch is trained on
    cfg.checkpoint.save, cfg.checkpoint.save_interval = str(folder / "checkpoints"), 3
    return pretrain(cfg, injection.forward_step, callbacks=[injection])


def faults(folder: Path) -> list[str]:
    """The texts of the records; each record is of the iteration that its text names."""
    lines = read_metrics(folder / "metrics.jsonl", "fault")
    assert all(line["text"].startswith(f"iteration {line['iteration']}: ") for line in lines)
    return [line["text"] for line in lines]


@pytest.mark.dist
@pytest.mark.parametrize("depth", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)])
def test_a_loss_that_is_not_finite_is_skipped_and_named(tmp_path: Path, depth: int):
    state = run(tmp_path, Injection(depth)).state
    assert (state.iteration, state.nan_iterations, state.skipped_iterations, state.skips_in_row) == (8, 1, 1, 0)
    (text,) = faults(tmp_path)
    assert text.startswith(f"iteration 4: {NAMES[depth]} is nan ({NAMES[depth]} on rank 0")
    assert "in samples" in text
    assert "train.on_nan = skip" in text
    assert not any(name in text for name in NAMES if name != NAMES[depth])
    for remedy in ("optimizer.lr", "optimizer.clip_grad", "bf16", "mtp_loss_scaling_factor"):
        assert remedy in text
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [math.isnan(step[NAMES[depth]]) for step in steps] == [False] * 3 + [True] + [False] * 4
    assert [step["nan-iterations"] for step in steps] == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.dist
def test_a_gradient_that_is_not_finite_is_found_though_all_losses_are(tmp_path: Path):
    state = run(tmp_path, Injection(None)).state
    assert (state.nan_iterations, state.skipped_iterations) == (1, 1)
    (text,) = faults(tmp_path)
    assert text.startswith("iteration 4: grad norm is nan (all losses are finite; the gradient of ")
    assert "input_layernorm.weight" in text
    assert "on rank 0" in text
    assert all(math.isfinite(step[name]) for step in read_metrics(tmp_path / "metrics.jsonl") for name in NAMES)


@pytest.mark.dist
@pytest.mark.parametrize("depth", [pytest.param(1, marks=SLOW), None], ids=["loss", "gradient"])
def test_stop_leaves_before_the_update(tmp_path: Path, depth: int | None):
    with pytest.raises(
        NumericsError, match=r"iteration 4.*train\.on_nan = stop: the run stops before the update"
    ) as error:
        run(tmp_path, Injection(depth), on_nan="stop")
    assert error.value.exit_code == 4
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.dist
def test_the_rank_is_named(tmp_path: Path):
    """Of two data-parallel ranks the second one has a bad loss at step 3 and a bad gradient at step 5."""
    assert run_ranks([sys.executable, "-m", "tests.training.guards.faulty_rank", str(tmp_path)], 2) == 0
    loss, gradient = faults(tmp_path)
    assert loss.startswith("iteration 3: mtp_2 loss is nan (mtp_2 loss on rank 1 (dp 1, host ")
    assert gradient.startswith("iteration 5: grad norm is nan (all losses are finite; the gradient of ")
    assert "on rank 1 (dp 1, host " in gradient
    assert "rank 0" not in loss + gradient


@pytest.mark.dist
@pytest.mark.parametrize("depth", [2, pytest.param(None, marks=SLOW)], ids=["loss", "gradient"])
def test_a_rollback_goes_back_and_skips_the_batches(tmp_path: Path, depth: int | None):
    """The curve is that of a run which trained on the batches 1 2 3 | 5 6 7 8 9: 3 is the checkpoint, 4 is skipped."""
    injection = Injection(depth)
    state = run(tmp_path / "bad", injection, on_nan="rollback").state
    assert (state.iteration, state.rollbacks, state.passed_over_samples) == (8, 1, injection.batch_size)
    assert injection.batch == 9
    skipped = run(tmp_path / "skipped", Injection(depth), steps=9).state
    assert skipped.consumed_samples == state.consumed_samples + state.passed_over_samples
    assert "rollback 1 of at most 3" in faults(tmp_path / "bad")[0]
    steps = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert [step["iteration"] for step in steps] == list(range(1, 9))
    assert all(math.isfinite(step["mtp_2 loss"]) for step in steps)
    # The first step after it has the weights of iteration 3 and the batch of step 5: the same as after a skip.
    other = read_metrics(tmp_path / "skipped" / "metrics.jsonl")
    assert steps[3]["lm loss"] == other[4]["lm loss"]


@pytest.mark.dist
def test_limits_end_the_run(tmp_path: Path):
    with pytest.raises(NumericsError, match="2 updates in a row were skipped"):
        run(tmp_path / "skip", Injection(1, steps=(3, 4, 5)), skip_limit=2)
    with pytest.raises(NumericsError, match="2 rollbacks were done"):
        run(tmp_path / "back", Injection(1, steps=(5, 6, 7)), on_nan="rollback", rollback_limit=2)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("policy", "skipped", "rollbacks"),
    [pytest.param("report", 0, 0, marks=SLOW), ("skip", 1, 0), pytest.param("rollback", 1, 1, marks=SLOW)],
)
def test_a_spike_is_judged_by_its_policy(tmp_path: Path, policy: str, skipped: int, rollbacks: int):
    spike = Injection(1, value=1e5, steps=(7,))
    state = run(tmp_path, spike, on_spike=policy, spike_window=8).state
    assert (state.iteration, state.skipped_iterations, state.rollbacks) == (8, skipped, rollbacks)
    text = next(text for text in faults(tmp_path) if "mtp_1 loss" in text)
    assert text.startswith("iteration 7: mtp_1 loss is ")
    assert f"train.on_spike = {policy}" in text


@pytest.mark.dist
def test_spikes_in_a_row_are_few_lines_and_all_in_the_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run(tmp_path, Injection(1, value=1e5, steps=tuple(range(7, 19))), steps=18, on_spike="report", spike_window=8)
    lines = [line for line in capfd.readouterr().out.splitlines() if "train.on_spike" in line or "reported" in line]
    assert [line.split(":")[0] for line in lines] == ["iteration 7", "iteration 16", "iterations 7 to 18"]
    assert "The 10th such step" in lines[1]
    assert "12 steps" in lines[2]
    assert [int(text.split(":")[0].split()[1]) for text in faults(tmp_path)] == list(range(7, 19))


@pytest.mark.unit
def test_what_is_a_spike():
    state = TrainState()
    watch = FaultWatch(TrainConfig(spike_window=20, spike_sigmas=6.0, on_spike="skip"), state)
    for step in range(9):
        assert watch.of_losses({"lm loss": 1e9}) is None, "too little is known"
        watch.remember({"lm loss": 3.0 + 0.1 * (-1) ** step}, norm=1.0 + 0.01 * step)
    watch.remember({"lm loss": 3.0}, norm=1.0)
    assert watch.of_losses({"lm loss": 3.5}) is None
    assert watch.of_losses({"lm loss": 1.0}) is None, "a fall is no spike"
    assert watch.of_losses({"lm loss": 3.8}).kind == "spike"
    assert watch.of_gradient(2.0).signs[0].startswith("grad norm is 2, ")
    assert watch.of_gradient(math.inf) == Fault("nan", ["grad norm is inf"])
    assert not watch.lets_pass(watch.of_losses({"lm loss": 3.8}))
    # A resumed run decides likewise.
    again = FaultWatch(TrainConfig(spike_window=20, on_spike="skip"), TrainState.from_dict(state.to_dict()))
    assert again.of_losses({"lm loss": 3.8}) == watch.of_losses({"lm loss": 3.8})


@pytest.mark.unit
def test_a_report_names_step_policy_place_and_remedies():
    action, text = decide(Fault("nan", ["lm loss is nan"]), TrainConfig(), TrainState(iteration=6), "lm loss on rank 3")
    assert action == "continue"
    assert text.startswith("iteration 7: lm loss is nan (lm loss on rank 3). train.on_nan = skip")
