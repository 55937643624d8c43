"""Which evaluation counts as the best so far."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_mtp.training.saving import Saver
from megatron_mtp.training.state import TrainState

pytestmark = pytest.mark.unit


def test_only_a_finite_loss_below_all_earlier_ones_is_the_best():
    state: Any = TrainState()
    saver = Saver(None, state, None)
    losses = (math.nan, math.inf, 3.0, 4.0, math.nan, 2.0)
    assert [saver.evaluated(loss) for loss in losses] == [False, False, True, False, False, True]
    assert state.best_validation_loss == 2.0
