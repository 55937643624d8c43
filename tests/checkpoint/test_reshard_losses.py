"""On four ranks, with real data and real gradients: a run saved at each layout and resumed at each other one has the
losses of the run that was never stopped.

`test_reshard_four` draws its gradients and compares weights bit for bit; here everything that a step needs must be
restored: weights, optimizer, counters, learning rate, router biases and the position in the data.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.training.state import TrainState
from tests.checkpoint.four_layouts import LAYOUTS, MODELS, SavedRuns, every_case
from tests.checkpoint.rig import Losses, make_config, real_steps
from tests.harness.runs import opened

SAVED_AT, STEPS = 3, 5
TOLERANCE = 1e-5
"""Of each depth's loss, in nats per token, in fp32: layouts add in different orders."""
REAL = {"optimizer.clip_grad": 1.0, "dataset.prefetch_steps": 0}
FAST = [("moe", "m|L", "ep2+pp2")]


def losses(values: dict[str, Any], directory: str, saves: bool) -> Losses:
    """Of the steps after SAVED_AT: of a run that saves there and trains on, or of one that resumes there."""
    with opened(make_config({**REAL, **values}, dist.get_world_size(), directory)) as run:
        engine, state = run.engine, TrainState()
        checkpointer = Checkpointer(run.cfg, run.groups)
        if saves:
            real_steps(run, state, SAVED_AT)
            checkpointer.save(engine.chunks, engine.optimizer, state)
        else:
            assert checkpointer.resume(engine.chunks, engine.optimizer, state)
            assert state.iteration == SAVED_AT
        checkpointer.release()
        return real_steps(run, state, STEPS)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> SavedRuns:
    """The losses of runs that were never stopped."""
    return SavedRuns(lambda values, directory: ranks(4).run(losses, values, directory, True)[0], tmp_path_factory)


@pytest.mark.dist
@every_case(FAST)
def test_the_next_five_losses_are_those_of_a_run_that_was_never_stopped(ranks, saved, model, old, new):
    expected, directory = saved(model, old)
    found = ranks(4).run(losses, {**MODELS[model], **LAYOUTS[new]}, directory, False)
    assert len(found[0]) == STEPS
    assert all(one == found[0] for one in found), "ranks disagree on the losses"
    worst = max(abs(a - b) for x, y in zip(expected, found[0], strict=True) for a, b in zip(x, y, strict=True))
    print(f"{model}, {old} to {new}: largest difference {worst:.1e}")
    assert worst < TOLERANCE
