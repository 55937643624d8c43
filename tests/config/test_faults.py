"""Policies for faults that cannot work are refused before anything starts."""

from __future__ import annotations

import pytest

from megatron_mtp.config.checks.faults import watchdog_timeout_s
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


def finalized(*overrides: str):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, list(overrides))
    return cfg.finalize(1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.on_nan=rollback"], "needs checkpoints to go back to"),
        (["train.on_spike=rollback", "checkpoint.save=x"], "checkpoint.save_interval_mins"),
        (
            ["train.on_nan=rollback", "checkpoint.save=x", "checkpoint.save_interval=5", "checkpoint.save_optim=false"],
            "needs checkpoint.save_optim = True",
        ),
        (["train.on_nan=shrug"], "train.on_nan"),
        (["train.spike_window=3"], "at least 4"),
        (["train.skip_limit=0"], "train.skip_limit"),
        (["train.rollback_limit=-1"], "train.rollback_limit"),
        (["checkpoint.keep_best=1", "checkpoint.save=x", "validation.eval_iters=0"], "needs evaluations"),
        (["checkpoint.keep_best=1", "checkpoint.save=x", "dataset.split=1,0,0"], "needs a validation set"),
        (["checkpoint.best_metric=docs/lm loss"], "those are validation/lm loss, validation/mtp_1 loss"),
        (["checkpoint.best_metric=validation/mtp_9 loss"], "Did you mean validation/mtp_"),
        (["checkpoint.keep_every=5"], "no effect without checkpoint.save"),
        (["dist.watchdog_s=600"], "must be below dist.distributed_timeout_minutes = 10.0 (600 s)"),
        (["dist.straggler_factor=0.5"], "must be above 1"),
        (["dist.preempted_exit_code=2"], "stands for a mistake of the user"),
        (["dist.preempted_exit_code=137"], "must be at least 1 and at most 125"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        finalized(*overrides)
    assert said in str(caught.value)


def test_the_watchdog_gives_up_before_the_collective_does():
    assert watchdog_timeout_s(finalized("dist.distributed_timeout_minutes=2")) == pytest.approx(108)
    assert watchdog_timeout_s(finalized("dist.watchdog_s=30")) == 30
    assert watchdog_timeout_s(finalized("dist.watchdog_s=0")) == 0


def test_what_works_is_accepted():
    cfg = finalized("train.on_nan=rollback", "checkpoint.save=x", "checkpoint.save_interval_mins=30")
    assert cfg.train.on_nan == "rollback"


def test_a_best_metric_of_a_set_and_a_depth_that_exist_is_accepted():
    sets = ("dataset.valid_sets.docs=[a]", "dataset.split=1,0,0")
    assert finalized(*sets, "checkpoint.best_metric=docs/mtp_2 loss").checkpoint.best_metric == "docs/mtp_2 loss"
    with pytest.raises(ConfigError, match="those are docs/lm loss, docs/mtp_1 loss, docs/mtp_2 loss"):
        finalized(*sets, "checkpoint.best_metric=validation/lm loss")
