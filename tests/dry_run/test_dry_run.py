"""Dry runs build what is predicted and what a real rank holds, and find what would fail at launch."""

from __future__ import annotations

import gc

import pytest
import torch

from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.device.memory_meter import LiveStorage
from megatron_mtp.dry_run import build as dry_run_module
from megatron_mtp.dry_run.build import dry_run
from megatron_mtp.parallel.params import RankParameters
from megatron_mtp.parallel.resolve import ResolvedRun, resolve
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.setup import leave_groups, setup

pytestmark = pytest.mark.unit

TP2 = "model.tensor_model_parallel_size=2 model.sequence_parallel=true"
PP2 = "model.pipeline_model_parallel_size=2"
PP4 = "model.pipeline_model_parallel_size=4 train.global_batch_size=16"
VP2 = "model.virtual_pipeline_model_parallel_size=2"
EP2, EP4 = "model.expert_model_parallel_size=2", "model.expert_model_parallel_size=4"
STANDALONE = "model.pipeline_model_parallel_layout=Ett|tt|mm|L"
VARIANTS = [
    ("tiny_dense", ""),
    ("tiny_dense", f"{PP2} model.mtp_num_layers=0"),
    ("tiny_dense", f"{PP2} model.mtp_num_layers=0 model.pipeline_model_parallel_layout=Etttt|L"),
    ("tiny_dense", f"{PP4} {STANDALONE}"),
    ("tiny_dense", f"{PP4} {STANDALONE} model.share_embeddings_and_output_weights=true"),
    ("tiny_dense", f"{PP2} model.share_embeddings_and_output_weights=true model.vocab_size=500"),
    ("tiny_dense", f"{TP2} {PP2} model.add_bias_linear=true model.normalization=LayerNorm"),
    ("tiny_dense", f"{TP2} model.add_qkv_bias=true model.gated_linear_unit=false model.activation_func=gelu"),
    ("tiny_dense", f"{PP2} model.mtp_use_repeated_layer=true model.mtp_num_layers=3"),
    ("tiny_dense", f"{PP2} model.mtp_variant=parallel model.mtp_freeze_trunk=true precision.dtype=bf16"),
    ("tiny_moe", f"{TP2} {PP2} {EP4} model.expert_tensor_parallel_size=1 train.global_batch_size=32"),
    ("tiny_moe", f"{TP2} model.moe_shared_expert_gate=true model.moe_layer_freq=2 {EP2}"),
    ("tiny_moe", f"{TP2} {PP2} {EP4} model.expert_tensor_parallel_size=1 train.global_batch_size=32 "
     "model.mtp_layer_mlp=dense model.mtp_ffn_hidden_size=80"),
    ("tiny_mla_moe", f"{TP2} {PP2} {VP2} {EP2} train.global_batch_size=32"),
    ("tiny_mla_moe", f"{TP2} model.q_lora_rank=null model.qk_layernorm=true"),
    ("tiny_mla_moe", f"{PP4} model.context_parallel_size=2 model.moe_shared_expert_intermediate_size=null"),
]  # fmt: skip


def make(recipe: str, overrides: str, replicas: int = 1) -> ResolvedRun:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, overrides.split())
    world_size = replicas * minimum_world_size(cfg.model)
    return resolve(cfg.finalize(world_size), world_size)


@pytest.mark.parametrize(("recipe", "overrides"), VARIANTS, ids=[" ".join(variant) for variant in VARIANTS])
def test_every_stage_holds_what_is_predicted(recipe, overrides):
    found = dry_run(make(recipe, overrides, replicas=2))
    assert found.problems == []
    for stage in found.stages:
        assert {built.parameters for built in stage.built} == {stage.predicted_parameters}
        assert len(stage.built) == 2, "the first and the last rank"
    assert found.parameters == found.predicted_parameters


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["deepseek_v3", "qwen3_30b_a3b"])
def test_large_models(recipe):
    found = dry_run(make(recipe, ""))
    assert found.problems == []
    assert found.parameters == found.predicted_parameters > 30e9
    assert sum(len(stage.ranks) for stage in found.stages) == found.world_size


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_a_rank_that_trains(dtype):
    resolved = make(
        "tiny_dense",
        f"dist.device=cpu precision.dtype={dtype} train.global_batch_size=2 ddp.use_distributed_optimizer=true",
    )
    (stage,) = dry_run(resolved).stages
    (built,) = stage.built
    with LiveStorage() as meter:
        run = setup(resolved)
        try:
            batches = run.data.train()
            run.engine.train(next(batches), 0.1)
            del batches
            gc.collect()
            held = meter.now_bytes
        finally:
            run.data.close()
            leave_groups()
    total = built.weight_bytes + built.gradient_bytes + built.optimizer_bytes
    assert total == pytest.approx(held, rel=0.02)  # batches, rotary tables and step counters are the rest
    per_parameter = {"fp32": 4 + 4 + 8, "bf16": 2 + 4 + 12}[dtype]
    assert total == pytest.approx(per_parameter * built.parameters, rel=0.01)  # buffers are padded


def test_a_stage_that_the_engine_refuses_is_named():
    run = make("tiny_moe", f"{PP2} model.mcore.moe_pad_expert_input_to_capacity=true")
    found = dry_run(run)
    assert found.parameters is None
    (problem,) = map(str, found.problems)
    assert problem.startswith("stages 0, 1: cannot be built: ")
    assert "moe_expert_capacity_factor" in problem


def test_what_needs_transformer_engine_is_left_out_and_noted():
    run = make("tiny_moe", "model.moe_grouped_gemm=true model.mcore.fp8=e4m3")
    found = dry_run(run)
    assert found.problems == []
    assert found.parameters == found.predicted_parameters
    assert [name in note for name, note in zip(("fp8", "moe_grouped_gemm"), found.notes, strict=True)] == [True, True]


def test_the_same_on_a_cpu_would_fail_at_launch():
    run = make("tiny_moe", "model.mcore.fp8=e4m3 dist.device=cpu")
    assert "Transformer Engine" in str(dry_run(run).problems[0])


def test_data_and_folders_are_opened(tmp_path):
    (tmp_path / "file").write_text("")
    run = make("tiny_dense", f"dataset.blend=[{tmp_path}/none] checkpoint.save={tmp_path}/file/run")
    problems = map(str, dry_run(run).problems)
    assert [part in problem for part, problem in zip(("none", "checkpoint.save"), problems, strict=True)] == [
        True,
        True,
    ]


def test_a_stage_that_does_not_fit_is_named():
    run = make("tiny_dense", f"{PP2} model.pipeline_model_parallel_layout=[1,3]")
    first, last = dry_run(run).stages
    assert first.peak_bytes < last.peak_bytes
    between = (first.peak_bytes + last.peak_bytes) / 2 / 2**30
    (problem,) = map(str, dry_run(run, memory_limit_gib=between).problems)
    assert problem.startswith("stage 1 (tttmmL) needs")


@pytest.mark.parametrize(("recipe", "overrides"), [VARIANTS[3], VARIANTS[6], VARIANTS[10]])
def test_planned_memory_equals_what_was_built(recipe, overrides):
    """Buffers are padded, and shards of the optimizer too."""
    for stage in dry_run(make(recipe, overrides, replicas=2)).stages:
        full, planned = stage.fullest, stage.planned
        assert full.weight_bytes == pytest.approx(planned.weights, rel=0.02)
        assert full.gradient_bytes == pytest.approx(planned.gradients, rel=0.02)
        assert full.optimizer_bytes == pytest.approx(planned.optimizer, rel=0.02)


def test_a_wrong_prediction_is_said(monkeypatch):
    monkeypatch.setattr(dry_run_module, "rank_parameters", lambda *_: RankParameters(dense=7))
    found = dry_run(make("tiny_dense", PP2))
    assert [str(problem).split(":")[0] for problem in found.problems] == ["stage 0, rank 0", "stage 1, rank 1"]


def test_the_process_is_as_before():
    import sys

    hook = sys.excepthook
    dry_run(make("tiny_dense", ""))
    assert sys.excepthook is hook
    assert not torch.distributed.is_initialized()
