"""A tiny model with its optimizer on the ranks of a pool, and steps whose gradients no layout can change.

A gradient is drawn from (step, parameter name, place in the whole tensor), so after a load at another layout the next
step must give bit-equal weights: any difference is the checkpoint's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.config import ConfigContainer
from megatron_mtp.model.sharded import (
    gradients_in_place_of_weights,
    sharded_tensors,
    unwrap,
)
from megatron_mtp.storage.address import is_address
from megatron_mtp.training.optimizer import apply_schedules
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from tests.harness.runs import opened, weights_of

DENSE = {"model.share_embeddings_and_output_weights": False}
TIED = {"model.share_embeddings_and_output_weights": True}
MOE = {
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.moe_layer_freq": [0, 0, 1, 1],  # at PP=2 the first stage has no experts,
    "model.moe_shared_expert_intermediate_size": 16,
    "model.moe_router_score_function": "sigmoid",
    "model.moe_router_enable_expert_bias": True,
}
TP2 = {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}
PP2 = {"model.pipeline_model_parallel_size": 2}
VP2 = {**PP2, "model.virtual_pipeline_model_parallel_size": 2}
EP2 = {"model.expert_model_parallel_size": 2, "model.expert_tensor_parallel_size": 1}
CP2 = {"model.context_parallel_size": 2}
DP = {}


def make_config(values: dict[str, Any], world_size: int, directory: str | None = None) -> ConfigContainer:
    """A finalized config of a model that takes milliseconds; `directory` is both save and load."""
    cfg = ConfigContainer()
    base = {
        "model.num_layers": 4,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 48,
        "model.num_attention_heads": 4,
        "model.num_query_groups": 2,
        "model.seq_length": 16,
        "model.vocab_size": 100,
        "model.make_vocab_size_divisible_by": 8,
        "model.mtp_num_layers": 2,
        "precision.dtype": "fp32",
        "optimizer.lr": 1e-2,
        "optimizer.min_lr": 1e-3,
        "optimizer.clip_grad": 0.0,  # a norm is summed in an order that the layout sets
        "scheduler.lr_warmup_iters": 2,
        "train.train_iters": 20,
        "train.global_batch_size": 8,
        "checkpoint.save": directory,
        "checkpoint.load": directory,
        "logger.log_dir": "nothing-is-logged" if is_address(directory or "") else None,
        "dataset.mock": True,
        "dist.device": "cpu",
        "dist.num_threads": 1,
    }
    for path, value in {**base, **values}.items():
        section, name = path.split(".")
        setattr(getattr(cfg, section), name, value)
    return cfg.finalize(world_size)


Losses = list[list[float]]
"""For each step the losses of depths 0..D, nats per token."""


class Rig:
    """One rank's run, the checkpointer and the train state."""

    def __init__(self, run: Run):
        self.run, self.cfg = run, run.cfg
        self.chunks, self.optimizer = run.engine.chunks, run.engine.optimizer
        self.checkpointer, self.state = Checkpointer(run.cfg, run.groups), TrainState()

    def steps(self, count: int) -> None:
        """Updates with drawn gradients and the schedule's rates."""
        lr, wd = self.run.resolved.learning_rate, self.run.resolved.weight_decay
        for _ in range(count):
            apply_schedules(self.optimizer, lr, wd, self.state.consumed_samples)
            for chunk in self.chunks:
                draw_gradients(chunk, self.state.iteration)
            updated, _, _ = self.optimizer.step()
            assert updated
            self.state.advance(self.cfg.train.global_batch_size, self.cfg.model.seq_length)

    def save(self) -> None:
        self.checkpointer.save(self.chunks, self.optimizer, self.state, "test")

    def resume(self) -> bool:
        return self.checkpointer.resume(self.chunks, self.optimizer, self.state)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole tensors on rank 0, copies of equal bits; padding of the vocabulary is cut off."""
        rows = self.cfg.model.vocab_size
        found = weights_of(self.run)
        return {k: v[:rows] if "word_embeddings" in k or "output_layer" in k else v for k, v in found.items()}


@torch.no_grad()
def draw_gradients(chunk: Any, step: int) -> None:
    """Fills every gradient, and every buffer, of a chunk from (step, name, place)."""
    model = unwrap(chunk)
    with gradients_in_place_of_weights(chunk) as parameters:
        for shard in sharded_tensors(model):
            if not shard.data.is_floating_point():
                continue
            shard.data.copy_(_draw(shard, step))
        drawn = [parameter.data for parameter in parameters]
    for parameter, gradient in zip(parameters, drawn, strict=True):
        parameter.main_grad.copy_(gradient)


def _draw(shard: Any, step: int) -> torch.Tensor:
    lead = shard.prepend_axis_num
    text = f"{step}|{shard.key}|{tuple(shard.global_offset[:lead])}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    shape = list(shard.global_shape[lead:])
    if "word_embeddings" in shard.key or "output_layer" in shard.key:
        shape[0] = 256  # the padded vocabulary depends on TP
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    box = tuple(slice(o, o + n) for o, n in zip(shard.global_offset[lead:], shard.local_shape, strict=True))
    return whole[box].reshape(shard.data.shape)


@contextmanager
def rig(cfg: ConfigContainer) -> Iterator[Rig]:
    """Builds everything on the ranks of a pool, and takes it down again."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with opened(cfg) as run:
        held = Rig(run)
        try:
            yield held
        finally:
            held.checkpointer.release()


def trained(values: dict[str, Any], steps: int, directory: str | None = None, save_at: int | None = None) -> Any:
    """Trains from scratch, saves on the way, and returns the weights (rank 0)."""
    with rig(make_config(values, dist.get_world_size(), directory)) as run:
        if save_at is not None:
            run.steps(save_at)
            run.save()
            run.checkpointer.maybe_finalize(blocking=True)
        run.steps(steps - run.state.iteration)
        return run.weights()


def resumed(values: dict[str, Any], steps: int, directory: str) -> Any:
    """Resumes, trains up to `steps` in all, and returns (iteration it resumed from, weights)."""
    with rig(make_config(values, dist.get_world_size(), directory)) as run:
        assert run.resume()
        start = run.state.iteration
        run.steps(steps - start)
        return start, run.weights()


def real_steps(run: Run, state: TrainState, count: int) -> Losses:
    """Steps with data and gradients as the training loop takes them; the losses of every depth."""
    resolved, found = run.resolved, []
    batches = run.data.train(state.data_position)
    for _ in range(count):
        batch = next(batches)
        apply_schedules(run.engine.optimizer, resolved.learning_rate, resolved.weight_decay, state.consumed_samples)
        factor = resolved.loss_factor.at(state.consumed_tokens)
        result = run.engine.train(batch, factor)
        assert result.updated
        state.advance(len(batch.sample_ids), run.cfg.model.seq_length)
        found.append(result.losses)
    batches.close()
    return found


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each parameter that is not bit-equal."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return {k: float((left[k] - right[k]).abs().max()) for k in left if not torch.equal(left[k], right[k])}
