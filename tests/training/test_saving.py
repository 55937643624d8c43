"""Which evaluation counts as the best so far."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mtp.config.sections import CheckpointConfig
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.state import TrainState

pytestmark = pytest.mark.unit


def opened(best_metric: str | None) -> Any:
    """What a Saver reads of a run."""
    return SimpleNamespace(cfg=SimpleNamespace(checkpoint=CheckpointConfig(best_metric=best_metric)))


def test_only_a_finite_loss_below_all_earlier_ones_is_the_best():
    state, run = TrainState(), opened(None)
    saver = Saver(run, state, None)
    losses = (math.nan, math.inf, 3.0, 4.0, math.nan, 2.0)
    assert [saver.evaluated(loss, {}) for loss in losses] == [False, False, True, False, False, True]
    assert state.best_validation_loss == 2.0


def test_the_best_is_that_of_the_chosen_loss_and_another_choice_starts_again():
    state, run = TrainState(), opened("docs/mtp_1 loss")
    saver = Saver(run, state, None)
    assert saver.evaluated(1.0, {"docs/mtp_1 loss": 3.0})
    assert not saver.evaluated(0.5, {"docs/mtp_1 loss": 3.5})
    assert not saver.evaluated(0.4, {}), "a depth without targets has no loss"
    run.cfg.checkpoint.best_metric = None
    assert saver.evaluated(9.0, {"docs/mtp_1 loss": 3.5})
    assert (state.best_validation_loss, state.best_metric) == (9.0, None)
