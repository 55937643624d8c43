"""Saving while training goes on: the checkpoint is of the step at which it was asked for."""

from __future__ import annotations

import gc
import threading

import pytest
import torch.distributed as dist

from megatron_mtp.checkpoint import writer
from tests.checkpoint.conftest import lead_ranks_to
from tests.checkpoint.rig import DENSE, differences, make_config, resumed, rig
from tests.harness.s3 import Fault

pytestmark = pytest.mark.dist

ADAM = {**DENSE, "checkpoint.async_save": True}
WHOLE = {**ADAM, "ddp.use_distributed_optimizer": False}
BF16 = {**ADAM, "precision.dtype": "bf16"}


class HeldBack:
    """Keeps this process's writing thread waiting until it is let go, so that steps surely happen meanwhile."""

    def __enter__(self) -> HeldBack:
        self.original, self.gate = writer.write, threading.Event()

        def write(*arguments):
            assert self.gate.wait(60)
            return self.original(*arguments)

        writer.write = write
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        writer.write = self.original


def save_while_training(values: dict, path: str) -> tuple:
    with rig(make_config(values, dist.get_world_size(), path)) as run, HeldBack() as held:
        run.steps(2)
        run.save()
        at_save = run.weights()
        run.steps(3)
        early = run.checkpointer.maybe_finalize()
        was_saving = run.checkpointer._pending is not None
        held.gate.set()
        finished = run.checkpointer.maybe_finalize(blocking=True)
        run.checkpointer.maybe_finalize()
        return early, was_saving, finished, run.checkpointer._pending is not None, at_save, run.weights()


@pytest.mark.parametrize(
    "values", [ADAM, WHOLE, pytest.param(BF16, marks=pytest.mark.slow)], ids=["sharded", "whole", "bf16"]
)
def test_steps_during_a_save_do_not_leak_into_it(ranks, run_folder, values):
    early, was_saving, finished, is_saving, at_save, trained_on = ranks(2).run(
        save_while_training, values, str(run_folder)
    )[0]
    assert (early, was_saving, finished, is_saving) == (None, True, 2, False)
    assert differences(at_save, trained_on), "the steps after the save changed nothing: this test cannot fail"
    start, weights = ranks(2).run(resumed, values, 2, str(run_folder))[0]
    assert start == 2
    assert differences(at_save, weights) == {}
    # Optimizer state too: going on from the checkpoint gives what the run itself came to.
    assert differences(trained_on, ranks(2).run(resumed, values, 5, str(run_folder))[0][1]) == {}


def collections_of_a_save(path: str) -> list[int]:
    with rig(make_config(ADAM, dist.get_world_size(), path)) as run:
        run.steps(1)
        found: list[int] = []
        gc.callbacks.append(lambda phase, info: found.append(info["generation"]) if phase == "start" else None)
        gc.disable()  # the automatic one
        try:
            run.save()
        finally:
            gc.callbacks.pop()
            gc.enable()
        return found


def test_a_save_collects_no_garbage(ranks, tmp_path):
    assert ranks(1).run(collections_of_a_save, str(tmp_path)) == [[]]


def save_twice(path: str) -> tuple:
    with rig(make_config(ADAM, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        run.steps(1)
        run.save()  # waits for the first
        saved = run.checkpointer.directory.iterations()
        run.checkpointer.close()
        return (
            saved,
            run.checkpointer.directory.iterations(),
            run.checkpointer.last_stall_s,
            run.checkpointer.last_save_s,
        )


def test_a_second_save_waits_for_the_first(ranks, run_folder):
    for first, both, stall_s, save_s in ranks(2).run(save_twice, str(run_folder)):
        assert first == [1]
        assert both == [2, 1]
        assert 0 < stall_s <= save_s


def save_to_a_slow_server(path: str) -> tuple[float, float]:
    with rig(make_config(ADAM, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        run.checkpointer.maybe_finalize(blocking=True)
        return run.checkpointer.last_stall_s, run.checkpointer.last_save_s


def test_a_slow_server_does_not_keep_training_waiting(ranks, s3):
    lead_ranks_to(ranks, s3.proxy.url)
    s3.inject(Fault("PUT", "distcp", delay_s=3.0))
    for stall_s, save_s in ranks(2).run(save_to_a_slow_server, s3.address()):
        assert stall_s < 2.5 < 3.0 < save_s


def one_rank_is_slow(path: str) -> list:
    with rig(make_config(ADAM, dist.get_world_size(), path)) as run:
        run.steps(1)
        with HeldBack() as held:
            if dist.get_rank() == 0:
                held.gate.set()
            run.save()
            if dist.get_rank() == 0:
                run.checkpointer._pending.writing.result()
            outcome = [run.checkpointer.maybe_finalize(), run.checkpointer.directory.iterations()]
            held.gate.set()
            return [*outcome, run.checkpointer.maybe_finalize(blocking=True)]


def test_a_checkpoint_is_whole_when_every_rank_has_written(ranks, run_folder):
    assert ranks(2).run(one_rank_is_slow, str(run_folder)) == [[None, [], 1], [None, [], 1]]
