"""Which evaluation counts as the best so far."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mtp.checkpoint.manifest import Evaluation
from megatron_mtp.config.sections import CheckpointConfig
from megatron_mtp.errors import CheckpointError
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.state import TrainState

pytestmark = pytest.mark.unit


def opened(best_metric: str | None) -> Any:
    """What a Saver reads of a run."""
    return SimpleNamespace(cfg=SimpleNamespace(checkpoint=CheckpointConfig(best_metric=best_metric)))


def test_only_a_finite_loss_below_all_earlier_ones_is_the_best():
    state, run = TrainState(), opened(None)
    saver = Saver(run, state, SimpleNamespace(last_saved=None))
    losses = (math.nan, math.inf, 3.0, 4.0, math.nan, 2.0)
    assert [saver.evaluated(loss, {}) for loss in losses] == [False, False, True, False, False, True]
    assert state.best_validation_loss == 2.0


def test_the_best_is_that_of_the_chosen_loss_and_another_choice_starts_again():
    state, run = TrainState(), opened("docs/mtp_1 loss")
    saver = Saver(run, state, SimpleNamespace(last_saved=None))
    assert saver.evaluated(1.0, {"docs/mtp_1 loss": 3.0})
    assert not saver.evaluated(0.5, {"docs/mtp_1 loss": 3.5})
    assert not saver.evaluated(0.4, {}), "a depth without targets has no loss"
    run.cfg.checkpoint.best_metric = None
    assert saver.evaluated(9.0, {"docs/mtp_1 loss": 3.5})
    assert (state.best_validation_loss, state.best_metric) == (9.0, None)


def test_a_checkpoint_of_this_iteration_gets_the_losses_and_a_failure_ends_nothing(caplog: pytest.LogCaptureFixture):
    def note(evaluation: Evaluation) -> None:
        noted.append(evaluation)
        if len(noted) == 2:
            raise CheckpointError("the disk is full")

    noted: list[Evaluation] = []
    checkpointer = SimpleNamespace(last_saved=4, note_evaluation=note)
    state = TrainState(iteration=4)
    saver = Saver(opened(None), state, checkpointer)
    assert saver.evaluated(3.0, {"docs/lm loss": 3.0})
    assert noted == [Evaluation(3.0, {"docs/lm loss": 3.0})]
    assert saver.evaluated(2.0, {})
    assert "the disk is full" in caplog.text
    state.iteration = 5
    assert saver.evaluated(1.0, {})
    assert len(noted) == 2
