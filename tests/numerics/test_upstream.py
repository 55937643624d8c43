"""Defects of Megatron-Core 0.19.2 that one rank can show; docs/numerics.md has an entry for each test."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch

from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.verify.compare import relative_errors
from tests.harness.models import SMALL, small_config
from tests.harness.runs import Step, assert_same_step, masked_step, opened

if TYPE_CHECKING:
    from megatron_mtp.objective.metrics import BatchMetrics

pytestmark = pytest.mark.dist

DENSE = (*SMALL, "train.micro_batch_size=1", "train.global_batch_size=2")
LOSS_SCALE = 1024.0


def ones(slots: int = 32) -> torch.Tensor:
    return torch.ones(2, slots)


def scaled_step(recipe: str, overrides: tuple[str, ...], masks: torch.Tensor) -> Step:
    """`masked_step` under a loss scale that the schedule applies, the gradients divided by it."""
    from megatron_mtp.training import optimizer, setup

    def with_scale(cfg, chunks, *arguments):
        optimizer.set_hooks(cfg, chunks, *arguments)
        chunks[0].config.grad_scale_func = lambda loss: loss * LOSS_SCALE

    with mock.patch.object(setup, "set_hooks", with_scale):
        step = masked_step(recipe, overrides, masks)
    step.gradients = {name: gradient / LOSS_SCALE for name, gradient in step.gradients.items()}
    return step


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_mla_moe"])
def test_the_loss_scale_reaches_every_term(ranks, recipe):
    router = () if recipe == "tiny_dense" else ("model.moe_z_loss_coeff=0.01", "model.moe_aux_loss_coeff=0.01")
    got = ranks(1).run(scaled_step, recipe, (*DENSE, *router), ones())[0]
    assert_same_step(got, ranks(1).run(masked_step, recipe, (*DENSE, *router), ones())[0])


def step_without_upstream_mtp(masks: torch.Tensor) -> Step:
    """Upstream's rolling, loss, autograd scaler and log replaced by an error, padding and packing looked for."""
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction as upstream

    from megatron_mtp.model.mtp import MTPLayer

    def refuse(*_, **__):
        raise AssertionError("upstream's MTP objective or roll was called")

    real = MTPLayer._get_embeddings

    def watched(self, *args, **kwargs):
        assert kwargs.get("packed_seq_params") is None
        assert kwargs.get("padding_mask") is None
        return real(self, *args, **kwargs)

    with (
        mock.patch.object(upstream, "roll_tensor", refuse),
        mock.patch.object(upstream, "process_mtp_loss", refuse),
        mock.patch.object(gpt_model, "process_mtp_loss", refuse),
        mock.patch.object(upstream.MTPLossAutoScaler, "apply", refuse),
        mock.patch.object(MTPLayer, "_get_embeddings", watched),
    ):
        return masked_step("tiny_dense", DENSE, masks)


def test_nothing_is_rolled_packed_or_padded_in_the_model(ranks):
    assert ranks(1).run(step_without_upstream_mtp, ones())[0].counts == [64, 62, 60]


def test_the_mask_is_mandatory():
    parameters = inspect.signature(MicroBatch).parameters
    assert parameters["loss_mask"].default is inspect.Parameter.empty


def evaluated() -> tuple[BatchMetrics, list[BatchMetrics], BatchMetrics, BatchMetrics]:
    """A validation set of two batches, each batch alone, and both joined to one: evaluated, and as a training step."""
    from megatron_mtp.training.evaluation import evaluate

    # End-of-document targets are masked, so the batches have different numbers of targets.
    overrides = (*DENSE, "validation.eval_iters=2", "validation.eval_global_batch_size=2", "dataset.eod_mask_loss=true")
    with opened(small_config("tiny_dense", overrides, 1)) as run:
        (result,) = evaluate(run.engine, run.data, 0.1).values()
        first, second = run.data.valid(run.data.valid_names[0])
        micro_batches = [*first.micro_batches, *second.micro_batches]
        joined = replace(first, micro_batches=micro_batches, num_targets=first.num_targets + second.num_targets)
        alone = [run.engine.evaluate(batch, 0.1) for batch in (first, second)]
        return result, alone, run.engine.evaluate(joined, 0.7), run.engine.forward_backward(joined, 0.1)


def test_evaluation_has_every_depth_as_sum_over_count(ranks):
    result, alone, joined, trained = ranks(1).run(evaluated)[0]
    counts = sum(batch.depth_counts for batch in alone)
    assert alone[0].depth_counts.tolist() != alone[1].depth_counts.tolist()
    assert result.losses == (sum(batch.depth_sums for batch in alone) / counts).tolist()
    assert result.acceptance[0].tolist() == counts.tolist()
    assert result.losses == joined.losses == trained.losses
    assert result.acceptance_rates() == joined.acceptance_rates() == trained.acceptance_rates()


RECOMPUTE = {
    "uniform": ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"),
    "uniform_2": ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=2"),
    "block": ("model.recompute_granularity=full", "model.recompute_method=block", "model.recompute_num_layers=1"),
    "selective": (
        "model.recompute_granularity=selective",
        "model.recompute_modules=[core_attn, layernorm, mla_up_proj, mlp, moe]",
    ),
}
# Of what the MTP layers keep for the backward pass without recomputation. Full: their inputs and the final norms.
MOST_KEPT = {"uniform": 0.35, "uniform_2": 0.35, "block": 0.35, "selective": 0.75}


def kept_by_mtp_layers(recipe: str, overrides: tuple[str, ...], masks: torch.Tensor) -> tuple[Step, int]:
    """A step, and the bytes of activations that the MTP layers keep for the backward pass of one micro-batch."""
    from megatron_mtp.model.mtp import MTPModel

    real, kept = MTPModel._run_depths, {}

    def watched(self, *args, **kwargs):
        weights = {p.untyped_storage().data_ptr() for p in self.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return real(self, *args, **kwargs)

    with mock.patch.object(MTPModel, "_run_depths", watched):
        step = masked_step(recipe, overrides, masks)
    return step, sum(kept.values())


@pytest.mark.parametrize("method", RECOMPUTE)
def test_recomputation_covers_mtp_layers_and_changes_no_gradient(ranks, method):
    overrides = (*DENSE, "model.moe_z_loss_coeff=0.01", "model.moe_aux_loss_coeff=0.01")
    plain, all_kept = ranks(1).run(kept_by_mtp_layers, "tiny_mla_moe", overrides, ones())[0]
    got, kept = ranks(1).run(kept_by_mtp_layers, "tiny_mla_moe", (*overrides, *RECOMPUTE[method]), ones())[0]
    assert_same_step(got, plain, gradient_tolerance=2e-6)
    assert kept < MOST_KEPT[method] * all_kept


def names_on_last_stage() -> list[str]:
    from megatron_mtp.model.sharded import unwrap

    overrides = (*DENSE, "model.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true")
    with opened(small_config("tiny_dense", overrides, 2)) as run:
        return [name for chunk in run.engine.chunks for name, _ in unwrap(chunk).named_parameters()]


def stage_without_experts() -> dict[str, float]:
    """Router losses of a step whose first stages, if there are several, have dense layers only."""
    import torch.distributed as dist

    overrides = (*DENSE, "model.moe_layer_freq=[0, 0, 0, 1]", "model.moe_aux_loss_coeff=0.01")
    step = masked_step(
        "tiny_mla_moe", (*overrides, f"model.pipeline_model_parallel_size={dist.get_world_size()}"), ones()
    )
    return step.router


def test_two_stages(ranks):
    """A tied head keeps no second weight of its own, and a stage without experts takes part in the router losses."""
    alone = ranks(1).run(stage_without_experts)[0]
    assert "output_layer.weight" not in ranks(2).run(names_on_last_stage)[1]
    assert ranks(2).run(stage_without_experts)[0] == pytest.approx(alone, rel=2e-6)


def test_gradient_errors_are_seen():
    """The measure that this folder's tests use is not blind: a part in a million of one tensor shows."""
    reference = {"a": torch.ones(100), "b": torch.ones(3)}
    assert max(relative_errors({"a": torch.ones(100), "b": torch.ones(3) * (1 + 1e-5)}, reference).values()) > 5e-6


@pytest.mark.slow
def test_a_standalone_mtp_stage_with_virtual_chunks(ranks):
    """Deadlocks in the interleaved schedule unless messages overlap."""
    deep = (*DENSE, "train.global_batch_size=4", "model.num_layers=6")
    masks = torch.ones(4, 32)
    masks[1, 7:] = 0
    layout = (
        "model.pipeline_model_parallel_size=4",
        "model.virtual_pipeline_model_parallel_size=2",
        "model.pipeline_model_parallel_layout=Et|t|t|t|t|t|mm|L",
    )
    reference = ranks(1).run(masked_step, "tiny_dense", deep, masks)[0]
    assert_same_step(ranks(4).run(masked_step, "tiny_dense", (*deep, *layout), masks)[0], reference)
