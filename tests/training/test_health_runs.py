"""Runs that are harmed: the health sign is reported within 50 steps under its name, once, across a crash and a resume.

Slow ranks are provoked in `tests/training/guards/test_watchdog.py`.

Every run is healthy for some steps and saves; what harms it begins right after. The healthy part is trained once for
each recipe.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mtp import pretrain
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.signs import STALL_NATS, STALL_SHARE
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training import gpt_step
from megatron_mtp.training.callbacks import Callback
from tests.harness.runs import call_before_each_batch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WITHIN = 50
HEALTHY = {"tiny_dense": 100, "tiny_mixtral": 150}
"""Steps before the harm."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prefixes and tokenizer of the standard library's text, and of eight short documents of it."""
    folder = tmp_path_factory.mktemp("data")
    train_jsonl, valid_jsonl = stdlib_jsonl(folder / "text")
    few = folder / "few.jsonl"
    short = sorted(train_jsonl.read_text(encoding="utf-8").splitlines(), key=len)[60:68]
    few.write_text("\n".join(short) + "\n", encoding="utf-8")
    train = prepare([train_jsonl], folder / "train", PrepareOptions(train_vocab_size=512, shuffle=1))
    found = {"train": train.prefixes[0], "tokenizer": train.tokenizer}
    for name, path in (("valid", valid_jsonl), ("few", few)):
        found[name] = prepare([path], folder / name, PrepareOptions(tokenizer=train.tokenizer)).prefixes[0]
    return found


def config(folder: Path, data: dict[str, str], recipe: str = "tiny_dense", train: str = "train") -> ConfigContainer:
    """A run in `folder` that saves after its healthy steps, and goes on from there if it is started again."""
    cfg, healthy = get_recipe(recipe), HEALTHY[recipe]
    cfg.model.mtp_num_layers = 1
    cfg.train.update(train_iters=healthy + 100, global_batch_size=8, micro_batch_size=8)
    cfg.scheduler.update(lr_warmup_iters=30, lr_decay_style="constant")
    cfg.validation.update(eval_interval=10 if train == "few" else None, eval_iters=2, eval_at_end=False)
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "checkpoints")
    cfg.checkpoint.save_interval = 20
    cfg.logger.update(log_dir=str(folder), log_interval=100, progress_bar=False)
    cfg.dist.update(device="cpu", num_threads=1)
    cfg.dataset.update(blend=None, mock=False, blend_per_split=[[data[train]], [data["valid"]], None], split=None)
    cfg.dataset.path_to_cache = str(folder / "cache")
    cfg.tokenizer.update(tokenizer_type="huggingface", tokenizer_model=data["tokenizer"])
    return cfg


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Callable[[str], Path]:
    """Folder of a run of a recipe after its healthy steps."""

    @cache
    def trained(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("healthy")
        cfg = config(folder, data, recipe)
        cfg.train.exit_interval = HEALTHY[recipe]
        pretrain(cfg)
        assert read_metrics(folder / "metrics.jsonl", "warning") == []
        return folder

    return trained


class Harm(Callback):
    """Harms the run in every step after `onset`."""

    def __init__(self, onset: int):
        self.onset, self.iteration = onset, 0
        self.run: Any = None

    def on_train_start(self, run: Any, state: Any) -> None:
        self.run, self.iteration = run, state.iteration
        self.start(run)
        self.between(run)

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        self.iteration = state.iteration
        self.between(run)

    @property
    def is_on(self) -> bool:
        """Whether the step that is being done is harmed."""
        return self.iteration >= self.onset

    def start(self, run: Any) -> None:
        """Called once."""

    def between(self, run: Any) -> None:
        """Called before each step."""

    def forward_step(self, context: Any, iterator: Any, model: Any) -> Any:
        """The forward step of the run."""
        return gpt_step.forward_step(context, iterator, model)

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        """Parameters whose name contains `part`."""
        return {name: weight for name, weight in self.run.engine.chunks[0].named_parameters() if part in name}


class Death(Callback):
    """Ends the process, as far as the run can know."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        if state.iteration == self.at:
            raise RuntimeError("the run dies")


class WrongLabels(Harm):
    """The labels of the MTP depth are those of other tokens."""

    def forward_step(self, context: Any, iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        labels = batch.labels.clone()
        labels[1] = labels[1].roll(37, dims=-1)
        return super().forward_step(context, iter([replace(batch, labels=labels)]), model)


class NaN(Harm):
    """The MTP loss is not a number in five steps."""

    def forward_step(self, context: Any, iterator: Any, model: Any) -> Any:
        total, loss = super().forward_step(context, iterator, model)
        if not self.onset <= self.iteration < self.onset + 5:
            return total, loss
        batch, output = loss.args
        sums = output.sums.clone()
        sums[1] = math.nan
        return total, partial(context.loss_function, batch, replace(output, sums=sums))


class Spikes(Harm):
    """Every fourth batch has labels that have nothing to do with it."""

    def forward_step(self, context: Any, iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        if self.is_on and self.iteration % 4 == 0:
            batch = replace(batch, labels=torch.full_like(batch.labels, 511))
        return super().forward_step(context, iter([batch]), model)


class Shaken(Harm):
    """The weights of the MTP layer are moved at random before each step."""

    size = 0.3

    def between(self, run: Any) -> None:
        if self.is_on:
            with torch.no_grad():
                for weight in self.weights("mtp.").values():
                    weight.add_(self.size * torch.randn_like(weight))


class HighRate(Harm):
    """The learning rate is thousands of times too high."""

    rate = 10.0

    def between(self, run: Any) -> None:
        if self.is_on:
            for group in run.engine.optimizer.param_groups:
                group["max_lr"] = self.rate


class TooHigh(HighRate):
    """The learning rate is a hundred times too high."""

    rate = 1.0


class DeadNorm(Harm):
    """The norms before the head are zero: every logit is."""

    def between(self, run: Any) -> None:
        if self.is_on:
            with torch.no_grad():
                for weight in self.weights("final_layernorm").values():
                    weight.zero_()


class Frozen(Harm):
    """The MTP layer keeps the weights that it had."""

    def __init__(self, onset: int):
        super().__init__(onset)
        self.kept: dict[str, torch.Tensor] = {}

    def between(self, run: Any) -> None:
        if not self.is_on:
            return
        if not self.kept:
            self.kept = {name: weight.detach().clone() for name, weight in self.weights("mtp.").items()}
        with torch.no_grad():
            for name, weight in self.weights("mtp.").items():
                weight.copy_(self.kept[name])


class Steep(Harm):
    """The loss is eight times as steep, as if a coefficient were wrong."""

    def forward_step(self, context: Any, iterator: Any, model: Any) -> Any:
        total, loss = super().forward_step(context, iterator, model)
        return (8 * total if self.is_on and loss is not None and torch.is_grad_enabled() else total), loss


class DeadExpert(Harm):
    """One expert of the first layer is never chosen."""

    def start(self, run: Any) -> None:
        router = next(m for m in run.engine.chunks[0].modules() if type(m).__name__ == "TopKRouter")
        gating = router.gating

        def biased(hidden: torch.Tensor) -> torch.Tensor:
            logits = gating(hidden)
            never = torch.zeros_like(logits)
            never[..., 3] = -1e4 if self.is_on else 0.0
            return logits + never

        router.gating = biased


class SlowData(Harm):
    """Every batch comes late."""

    def start(self, run: Any) -> None:
        call_before_each_batch(run.data, lambda _: time.sleep(0.05 if self.is_on else 0.0))


def harmed(folder: Path, data: dict[str, str], harm: Harm, recipe: str = "tiny_dense", **fields: Any) -> list[Any]:
    """Goes on with a healthy run that is harmed, and dies once, five steps after a checkpoint. Returns its signs."""
    cfg = config(folder, data, recipe)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(cfg, section), field, value)
    with pytest.raises(RuntimeError, match="dies"):
        pretrain(cfg, harm.forward_step, callbacks=[harm, Death(harm.onset + 65)])
    pretrain(cfg, harm.forward_step, callbacks=[harm])
    return signs_of(folder)


def signs_of(folder: Path) -> list[tuple[str, bool, int]]:
    """(sign, begins, iteration) in order."""
    path = folder / "metrics.jsonl"
    lines = [*read_metrics(path, "warning"), *read_metrics(path, "recovery")]
    found = [(line["sign"], line["kind"] == "warning", line["iteration"]) for line in lines]
    return sorted(found, key=lambda one: one[2])


CASES: list[tuple[str, type[Harm], str, dict[str, Any]]] = [
    ("not finite", NaN, "tiny_dense", {}),
    ("spikes", Spikes, "tiny_dense", {}),
    ("grad norm drifts", HighRate, "tiny_dense", {}),
    ("worse than chance", TooHigh, "tiny_dense", {}),
    ("one token", DeadNorm, "tiny_dense", {}),
    ("grad norm drifts", Steep, "tiny_dense", {}),
    ("mtp frozen: mtp_1", Frozen, "tiny_dense", {}),
    ("mtp rises: mtp_1", Shaken, "tiny_dense", {}),
    ("acceptance falls: mtp_1", Shaken, "tiny_dense", {}),
    ("gap widens: mtp_1", Shaken, "tiny_dense", {}),
    ("main overshadowed", Harm, "tiny_dense", {"model__mtp_loss_scaling_factor": 100.0}),
    ("experts imbalanced", DeadExpert, "tiny_mixtral", {}),
    ("data stalls", SlowData, "tiny_dense", {"dataset__prefetch_steps": 0}),
]
"""Sign, what provokes it, recipe, fields of the config."""


@pytest.mark.parametrize(
    ("sign", "kind", "recipe", "fields"), [pytest.param(*case, id=f"{case[1].__name__}, {case[0]}") for case in CASES]
)
def test_a_sign_is_reported_within_50_steps_once(
    sign: str,
    kind: type[Harm],
    recipe: str,
    fields: dict[str, Any],
    tmp_path: Path,
    data: dict[str, str],
    healthy: Callable[[str], Path],
):
    folder, onset = tmp_path / "run", HEALTHY[recipe]
    shutil.copytree(healthy(recipe), folder)
    found = harmed(folder, data, kind(onset), recipe, **fields)
    print(json.dumps(found))
    begun = [at for name, begins, at in found if name == sign and begins]
    assert len(begun) == 1, found
    assert onset < begun[0] <= onset + WITHIN, found


def test_a_sign_is_reported_once_over_a_kill(tmp_path: Path, data: dict[str, str], healthy: Callable[[str], Path]):
    folder, onset = tmp_path / "run", HEALTHY["tiny_dense"]
    shutil.copytree(healthy("tiny_dense"), folder)
    cfg = config(folder, data)
    cfg.model.mtp_loss_scaling_factor = 100.0
    file = tmp_path / "run.yaml"
    cfg.to_yaml(file)
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(read_metrics(folder / "metrics.jsonl", "step")) < onset + 65:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    found = signs_of(folder)
    begun = [at for name, begins, at in found if name == "main overshadowed" and begins]
    assert len(begun) == 1, found
    assert onset < begun[0] <= onset + WITHIN, found
    assert len(read_metrics(folder / "metrics.jsonl", "step")) == cfg.train.train_iters


def test_memorising_is_reported(tmp_path: Path, data: dict[str, str]):
    cfg = config(tmp_path, data, train="few")
    cfg.train.train_iters = 260
    cfg.optimizer.weight_decay = 0.0
    with pytest.raises(RuntimeError, match="dies"):
        pretrain(cfg, callbacks=[Death(205)])
    pretrain(cfg)
    evaluations = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    lowest, onset = math.inf, None
    for line in evaluations:
        lowest = min(lowest, line["lm loss"])
        if onset is None and line["lm loss"] > lowest + 0.1:
            onset = line["iteration"]
    found = signs_of(tmp_path)
    print(onset, json.dumps(found))
    (begun,) = [at for name, begins, at in found if name == "memorising: validation" and begins]
    assert onset is not None
    assert onset <= begun <= onset + WITHIN


def test_a_depth_that_stalls_is_reported(tmp_path: Path, data: dict[str, str]):
    """Its labels are wrong from the first step: it learns how frequent tokens are, as the main model does, and no more.

    The onset is where the curve shows it: the main loss has fallen by as much as the sign asks for since a step from
    which the loss of the depth has not.
    """
    cfg = config(tmp_path, data)
    cfg.train.train_iters = 200
    harm = WrongLabels(0)
    with pytest.raises(RuntimeError, match="dies"):
        pretrain(cfg, harm.forward_step, callbacks=[Death(125)])
    pretrain(cfg, harm.forward_step)
    steps = read_metrics(tmp_path / "metrics.jsonl", "step")
    levels = [
        [statistics.median(line[name] for line in steps[end - 20 : end]) for name in ("lm loss", "mtp_1 loss")]
        for end in range(20, 201)
    ]

    def stalls(now: int) -> bool:
        falls = [[old - new for old, new in zip(before, levels[now], strict=True)] for before in levels[:now]]
        return any(main > STALL_NATS and depth < STALL_SHARE * main for main, depth in falls)

    onset = 20 + next(filter(stalls, range(len(levels))))
    found = signs_of(tmp_path)
    print(onset, json.dumps(found))
    (begun,) = [at for name, begins, at in found if name == "mtp stalls: mtp_1" and begins]
    assert onset <= begun <= onset + WITHIN
