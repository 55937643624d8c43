"""Training the MTP layers on a frozen trunk: nothing else moves by a bit, and every layout trains the same layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gloo_pool import GlooPool
from tests.numerics.runs import SMALL, Curve, curve, opened, relative_errors, small_config

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
def alone():
    with GlooPool(1) as pool:
        yield {
            tied: pool.run(
                curve, "tiny_mla_moe", (*FROZEN, f"model.share_embeddings_and_output_weights={tied}"), STEPS
            )[0]
            for tied in (False, True)
        }


@pytest.fixture(scope="module")
def pool():
    with GlooPool(2) as pool:
        yield pool


def assert_only_mtp_moved(figures: Curve) -> None:
    for name, before in figures.weights_before.items():
        moved = not torch.equal(before, figures.weights_after[name])
        assert moved == name.startswith("mtp."), name
    assert all(name.startswith("mtp.") for name in figures.first_gradients)


def test_one_rank(alone):
    assert_only_mtp_moved(alone[False])


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_layouts_equal_one_rank(pool, alone, layout):
    reference = alone["tied" in layout]
    got = pool.run(curve, "tiny_mla_moe", (*FROZEN, *LAYOUTS[layout]), STEPS)[0]
    assert_only_mtp_moved(got)
    assert got.spread == 0
    for mine, theirs in zip(got.losses, reference.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert got.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    errors = relative_errors(got.first_gradients, reference.first_gradients)
    assert max(errors.values()) <= 5e-6, max(errors, key=errors.get)


def frozen_after_pretraining(directory: str) -> Any:
    """Two steps with a trunk that is trained, a save, and a step on the frozen trunk. Weights at the save and after, on rank 0."""
    import torch.distributed as dist

    from megatron_mtp.checkpoint import Checkpointer
    from megatron_mtp.model.sharded import gather_parts, parameter_parts, whole_tensors
    from megatron_mtp.training.state import TrainState

    places = (f"checkpoint.save={directory}", f"checkpoint.load={directory}", "checkpoint.load_optim=false")
    weights = []
    for is_frozen in (False, True):
        overrides = (*FROZEN, *places, f"model.mtp_freeze_trunk={is_frozen}")
        with opened(small_config("tiny_mla_moe", overrides, dist.get_world_size())) as run:
            state, checkpointer = TrainState(), Checkpointer(run.cfg, run.groups)
            assert checkpointer.resume(run.engine.chunks, run.engine.optimizer, state) == is_frozen
            batches = run.data.train(state.consumed_samples)
            for _ in range(1 if is_frozen else 2):
                run.engine.train(next(batches), 1.0)
                state.advance(run.cfg.train.global_batch_size, run.cfg.model.seq_length)
            if not is_frozen:
                checkpointer.save(run.engine.chunks, run.engine.optimizer, state, "test")
                checkpointer.maybe_finalize(blocking=True)
            batches.close()
            checkpointer.close()
            weights.append(gather_parts(parameter_parts(run.engine.chunks)))
    return [whole_tensors(parts)[0] for parts in weights] if weights[0] else None


def test_a_trunk_can_be_frozen_after_pretraining(pool, tmp_path):
    pretrained, after = pool.run(frozen_after_pretraining, str(tmp_path))[0]
    for name, weight in pretrained.items():
        assert torch.equal(weight, after[name]) != name.startswith("mtp."), name


def saved_and_resumed(overrides: tuple[str, ...], directory: str) -> Any:
    """Two steps, a save, one step; then a new run that resumes and takes that step. The weights of both, on rank 0."""
    import torch.distributed as dist

    from megatron_mtp.checkpoint import Checkpointer
    from megatron_mtp.model.sharded import gather_parts, parameter_parts, whole_tensors
    from megatron_mtp.training.state import TrainState

    places = (f"checkpoint.save={directory}", f"checkpoint.load={directory}")
    cfg = small_config("tiny_mla_moe", (*FROZEN, *overrides, *places), dist.get_world_size())
    weights = []
    for is_resumed in (False, True):
        with opened(cfg) as run:
            state, checkpointer = TrainState(), Checkpointer(cfg, run.groups)
            assert checkpointer.resume(run.engine.chunks, run.engine.optimizer, state) == is_resumed
            batches = run.data.train(state.consumed_samples)
            while state.iteration < 3:
                run.engine.train(next(batches), 1.0)
                state.advance(cfg.train.global_batch_size, cfg.model.seq_length)
                if state.iteration == 2:
                    checkpointer.save(run.engine.chunks, run.engine.optimizer, state, "test")
                    checkpointer.maybe_finalize(blocking=True)
            batches.close()
            checkpointer.close()
            weights.append(gather_parts(parameter_parts(run.engine.chunks)))
    return [whole_tensors(parts)[0] for parts in weights] if weights[0] else None


@pytest.mark.parametrize("layout", ["pp2", "pp2_without_trunk_layers_beside_mtp", "pp2_distributed_optimizer"])
def test_a_rank_without_trainable_parameters_saves_and_resumes(pool, tmp_path, layout):
    through, resumed = pool.run(saved_and_resumed, LAYOUTS[layout], str(tmp_path))[0]
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)
