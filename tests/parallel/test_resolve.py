"""A run is resolved once: the planner is asked once, and nothing is parsed or rebuilt at a step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.config.schedules import LearningRate, WeightDecay
from megatron_mtp.device.worker_pool import WorkerPool
from megatron_mtp.parallel.planner.planner import Planner
from megatron_mtp.parallel.resolve import ResolvedRun, resolve
from megatron_mtp.recipes import get_recipe
from tests.harness.ranks import TIMEOUT_S

RESOLVING = [
    (Planner, "choose"),
    (ResolvedRun, "__init__"),
    (LossFactor, "__init__"),
    (LearningRate, "__init__"),
    (WeightDecay, "__init__"),
]


@contextmanager
def counted() -> Iterator[Counter]:
    """How often each function that resolves a part of a config was called."""
    calls: Counter = Counter()

    def watched(name: str, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in RESOLVING:
            label = f"{owner.__name__}.{name}"
            stack.enter_context(mock.patch.object(owner, name, watched(label, getattr(owner, name))))
        yield calls


def train(folder: str) -> tuple[Counter, Counter]:
    """On each rank of two stages: calls before the first step, and those of three steps, evaluations and a save."""
    from megatron_mtp import pretrain
    from megatron_mtp.training.callbacks import Callback

    class AtStart(Callback):
        def on_train_start(self, run, state):
            before.update(calls)
            calls.clear()

    cfg = get_recipe("tiny_dense")
    apply_overrides(
        cfg,
        ["dist.device=cpu", "dist.num_threads=1", "model.pipeline_model_parallel_size=2", f"checkpoint.save={folder}",
         "train.train_iters=3", "train.global_batch_size=4", "validation.eval_iters=1", "validation.eval_interval=2"],
    )  # fmt: skip
    before: Counter = Counter()
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    with counted() as calls:
        pretrain(cfg, callbacks=[AtStart()])
    return before, calls


@pytest.mark.dist
def test_a_run_asks_the_planner_once_and_resolves_nothing_at_a_step(tmp_path):
    with WorkerPool(2, TIMEOUT_S, ["tests.harness.preload"]) as pool:  # pretrain leaves the group: not the shared ranks
        found = pool.run(train, str(tmp_path / "run"))
    for before, during in found:
        assert before.pop("LossFactor.__init__") <= 3, "the checks of the config and of its phase parse it too"
        assert set(before.values()) == {1}
        assert len(before) == len(RESOLVING) - 1
        assert not during


def test_a_layout_of_the_config_asks_no_planner():
    cfg = get_recipe("tiny_dense")
    cfg.model.pipeline_model_parallel_size, cfg.model.pipeline_model_parallel_layout = 2, "Et|tttmmL"
    with counted() as calls:
        run = resolve(cfg.finalize())
    assert run.layout.string == "Et|tttmmL"
    assert run.planned is None
    assert not calls["Planner.choose"]
