"""Training the MTP layers on a frozen trunk: nothing else moves by a bit, and every layout trains the same layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_mtp.verify.compare import relative_errors
from tests.harness.models import SMALL, small_config
from tests.harness.runs import Curve, curve, opened, weights_of

pytestmark = pytest.mark.dist

STEPS = 3
# Weight decay so strong that a trunk it touched would show; expert biases that would move at every step.
FROZEN = (
    *SMALL,
    "model.mtp_freeze_trunk=true",
    "optimizer.weight_decay=10",
    "scheduler.lr_warmup_iters=0",
    "model.moe_router_bias_update_rate=0.1",
)
LAYOUTS = {
    "tp2_sp": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    "pp2": ("model.pipeline_model_parallel_size=2",),
    # The first stage has no trainable parameter; the last one neither.
    "pp2_without_trunk_layers_beside_mtp": (
        "model.pipeline_model_parallel_size=2",
        "model.pipeline_model_parallel_layout=Etttt|mmL",
    ),
    "pp2_vp2": ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
    "pp2_distributed_optimizer": ("model.pipeline_model_parallel_size=2", "ddp.use_distributed_optimizer=true"),
    "dp2_distributed_optimizer": ("ddp.use_distributed_optimizer=true",),
    "pp2_tied": ("model.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true"),
    "pp2_full_recompute": (
        "model.pipeline_model_parallel_size=2",
        "model.recompute_granularity=full",
        "model.recompute_method=uniform",
        "model.recompute_num_layers=1",
    ),
}


QUICK = ("tp2_sp", "pp2_without_trunk_layers_beside_mtp", "dp2_distributed_optimizer")


@pytest.fixture(scope="module")
def alone(ranks):
    """The curve of one rank, by whether the head is tied."""
    return {
        tied: ranks(1).run(
            curve, "tiny_mla_moe", (*FROZEN, f"model.share_embeddings_and_output_weights={tied}"), STEPS
        )[0]
        for tied in (False, True)
    }


def assert_only_mtp_moved(got: Curve) -> None:
    for name, before in got.weights_before.items():
        moved = not torch.equal(before, got.weights_after[name])
        assert moved == name.startswith("mtp."), name
    assert all(name.startswith("mtp.") for name in got.first_gradients)


def test_one_rank(alone):
    assert_only_mtp_moved(alone[False])


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_layouts_equal_one_rank(ranks, alone, layout):
    reference = alone["tied" in layout]
    got = ranks(2).run(curve, "tiny_mla_moe", (*FROZEN, *LAYOUTS[layout]), STEPS)[0]
    assert_only_mtp_moved(got)
    for mine, theirs in zip(got.losses, reference.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert got.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    errors = relative_errors(got.first_gradients, reference.first_gradients)
    assert max(errors.values()) <= 5e-6, max(errors, key=errors.get)


def frozen_after_pretraining(directory: str) -> Any:
    """Two steps that train the trunk, a save, a step on the frozen trunk: the weights at the save and the end."""
    places = (f"checkpoint.save={directory}", f"checkpoint.load={directory}", "checkpoint.load_optim=false")
    return [
        trained_to(end, (*FROZEN, *places, f"model.mtp_freeze_trunk={end == 3}"), is_resumed=end == 3, save_at=2)
        for end in (2, 3)
    ]


def trained_to(end: int, overrides: tuple[str, ...], is_resumed: bool, save_at: int) -> dict[str, torch.Tensor]:
    """The weights after step `end` of a run that resumes or starts, and that saves after step `save_at`; on rank 0."""
    import torch.distributed as dist

    from megatron_mtp.checkpoint import Checkpointer
    from megatron_mtp.training.state import TrainState

    with opened(small_config("tiny_mla_moe", overrides, dist.get_world_size())) as run:
        state, checkpointer = TrainState(), Checkpointer(run.cfg, run.groups)
        assert checkpointer.resume(run.engine.chunks, run.engine.optimizer, state) == is_resumed
        batches = run.data.train(state.consumed_samples)
        while state.iteration < end:
            run.engine.train(next(batches), 1.0)
            state.advance(run.cfg.train.global_batch_size, run.cfg.model.seq_length)
            if state.iteration == save_at:
                checkpointer.save(run.engine.chunks, run.engine.optimizer, state, "test")
                checkpointer.maybe_finalize(blocking=True)
        batches.close()
        checkpointer.close()
        checkpointer.release()
        return weights_of(run)


def test_a_trunk_can_be_frozen_after_pretraining(ranks, tmp_path):
    pretrained, after = ranks(2).run(frozen_after_pretraining, str(tmp_path))[0]
    for name, weight in pretrained.items():
        assert torch.equal(weight, after[name]) != name.startswith("mtp."), name


def saved_and_resumed(overrides: tuple[str, ...], directory: str) -> Any:
    """Three steps with a save after the second, and a new run that resumes for the third: the weights of both."""
    fields = (*FROZEN, *overrides, f"checkpoint.save={directory}", f"checkpoint.load={directory}")
    return [trained_to(3, fields, is_resumed, save_at=2) for is_resumed in (False, True)]


@pytest.mark.parametrize("layout", ["pp2", "pp2_without_trunk_layers_beside_mtp", "pp2_distributed_optimizer"])
def test_a_rank_without_trainable_parameters_saves_and_resumes(ranks, tmp_path, layout):
    through, resumed = ranks(2).run(saved_and_resumed, LAYOUTS[layout], str(tmp_path))[0]
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)
