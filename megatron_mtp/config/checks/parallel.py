"""Checks of placement: does the model divide over the parallel sizes, and do the sizes fit the number of processes."""

from __future__ import annotations

import math

from megatron_mtp.config.knob import Range
from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.config.problem import problem
from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.config.sections import ModelConfig, RunConfig
from megatron_mtp.errors import Problem

MOST_CALLS, MOST_CHUNKS = 4096, 256
"""A round of a schedule has pp * pp * vp calls in each direction; more take many seconds to plan."""
WORLD_SIZES = Range(gt=0, le=10_000_000)
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def placement_problems(model: ModelConfig) -> list[Problem]:
    """Divisions of the model over TP, PP, CP, EP, and its recomputation. Expects values inside their ranges."""
    problems = _tensor_problems(model) + _sequence_problems(model) + _expert_problems(model)
    problems += _recompute_problems(model)
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if vp > 1 and pp == 1:
        rule = "the interleaved schedule needs {model.pipeline_model_parallel_size} above 1"
        return [*problems, problem(model, "model.virtual_pipeline_model_parallel_size", rule)]
    if model.pipeline_model_parallel_layout in (None, "auto") and (pp * pp * vp > MOST_CALLS or pp * vp > MOST_CHUNKS):
        rule = (
            "the planner simulates up to {chunks} chunks, and {calls} chunks x stages; here are {num_chunks} chunks on "
            "{model.pipeline_model_parallel_size=} stages ({model.virtual_pipeline_model_parallel_size=})"
        )
        remedy = "Use 'even', or write the layout."
        sizes = {"chunks": MOST_CHUNKS, "calls": MOST_CALLS, "num_chunks": pp * vp}
        problems.append(problem(model, "model.pipeline_model_parallel_layout", rule, remedy, **sizes))
    _, found = layout_chunks(
        model.pipeline_model_parallel_layout, num_layers=model.num_layers, num_depths=model.mtp_num_layers, pp=pp, vp=vp
    )
    return problems + found


def _tensor_problems(model: ModelConfig) -> list[Problem]:
    tp, tp_name = model.tensor_model_parallel_size, "tensor_model_parallel_size"
    dense = ("num_attention_heads", "ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_ffn_hidden_size")
    divided = dict.fromkeys(dense, tp_name)
    if model.num_moe_experts is not None:
        divided["moe_ffn_hidden_size"] = "expert_tensor_parallel_size"
    if model.multi_latent_attention:
        divided["q_lora_rank"] = tp_name
    problems = [
        problem(model, f"model.{name}", f"must be divisible by {{model.{size}=}}")
        for name, size in divided.items()
        if getattr(model, name) is not None and getattr(model, name) % getattr(model, size)
    ]
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        rule = "must be a multiple or a divisor of {model.tensor_model_parallel_size=}"
        problems.append(problem(model, "model.num_query_groups", rule))
    if model.experimental_attention_variant is not None:
        problems += _linear_head_problems(model)
    latent = model.kv_lora_rank + model.qk_pos_emb_head_dim
    if model.multi_latent_attention and latent % tp:
        rule = "with {model.qk_pos_emb_head_dim=} added must be divisible by {model.tensor_model_parallel_size=}"
        problems.append(problem(model, "model.kv_lora_rank", rule))
    return problems


def _linear_head_problems(model: ModelConfig) -> list[Problem]:
    """Linear attention shards its heads over TP and CP: a head reads the complete sequence."""
    size = model.tensor_model_parallel_size * model.context_parallel_size
    rule = "must be divisible by {model.tensor_model_parallel_size=} x {model.context_parallel_size=}"
    return [
        problem(model, f"model.{name}", rule)
        for name in ("linear_num_key_heads", "linear_num_value_heads")
        if getattr(model, name) % size
    ]


def _sequence_problems(model: ModelConfig) -> list[Problem]:
    cp, tp, seq = model.context_parallel_size, model.tensor_model_parallel_size, model.seq_length
    if cp > 1 and seq % (2 * cp):
        rule = (
            "must be divisible by 2 x {model.context_parallel_size=}, because each rank gets two pieces, one from each "
            "end, so that causal attention is balanced"
        )
        return [problem(model, "model.seq_length", rule)]
    if model.sequence_parallel and (seq // cp) % tp:
        rule = (
            "the piece of one rank ({model.context_parallel_size=}) must be divisible by "
            "{model.tensor_model_parallel_size=} under {model.sequence_parallel}"
        )
        return [problem(model, "model.seq_length", rule)]
    return []


def _expert_problems(model: ModelConfig) -> list[Problem]:
    ep, name = model.expert_model_parallel_size, "model.expert_model_parallel_size"
    if model.num_moe_experts is None:
        return [problem(model, name, "needs experts; {model.num_moe_experts} is not set")] if ep > 1 else []
    problems = []
    if model.num_moe_experts % ep:
        rule = "must be divisible by {model.expert_model_parallel_size=}"
        problems.append(problem(model, "model.num_moe_experts", rule))
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        rule = (
            "Megatron-Core trains experts under {model.tensor_model_parallel_size=} with sequence parallelism only "
            "({model.num_moe_experts=})"
        )
        problems.append(problem(model, "model.sequence_parallel", rule, "Set it to True."))
    return problems


def _recompute_problems(model: ModelConfig) -> list[Problem]:
    granularity, details = (
        model.recompute_granularity,
        ("recompute_method", "recompute_num_layers", "recompute_modules"),
    )
    given = [name for name in details if getattr(model, name) is not None]
    if granularity is None:
        return [problem(model, f"model.{name}", "needs {model.recompute_granularity}") for name in given]
    foreign = {"full": ("recompute_modules",), "selective": ("recompute_method", "recompute_num_layers")}[granularity]
    other = "selective" if granularity == "full" else "full"
    problems = [
        problem(model, f"model.{name}", "belongs to {model.recompute_granularity} = {other}", other=repr(other))
        for name in given
        if name in foreign
    ]
    if granularity == "selective":
        return problems + _module_problems(model)
    if model.recompute_method is None or model.recompute_num_layers is None:
        rule = "needs {model.recompute_method} ('uniform' or 'block') and {model.recompute_num_layers}"
        problems.append(problem(model, "model.recompute_granularity", rule))
    return problems


def _module_problems(model: ModelConfig) -> list[Problem]:
    name, problems = "model.recompute_modules", []
    needs = {
        "mla_up_proj": (model.multi_latent_attention, "{model.multi_latent_attention}"),
        "moe": (model.num_moe_experts is not None, "{model.num_moe_experts}"),
        "moe_act": (model.moe_grouped_gemm is True, "{model.moe_grouped_gemm} = True"),
        "shared_experts": (
            model.moe_shared_expert_intermediate_size is not None,
            "{model.moe_shared_expert_intermediate_size}",
        ),
    }
    for module in model.recompute_modules or ():
        if module not in RECOMPUTE_MODULES:
            rule, known = "there is no {module}; known are {known}", ", ".join(RECOMPUTE_MODULES)
            problems.append(problem(model, name, rule, module=repr(module), known=known))
        elif not needs.get(module, (True, ""))[0]:
            problems.append(problem(model, name, f"{{module}} needs {needs[module][1]}", module=repr(module)))
    return problems


def batch_problems(cfg: RunConfig, dp: int | None) -> list[Problem]:
    """Whether batches divide into micro-batches over `dp` data-parallel ranks; dp None: over one."""
    train, val = cfg.train, cfg.validation
    problems = []
    for size in BatchSchedule.of(train).sizes()[:-1]:
        if found := _batch_problem(cfg, "train.rampup_batch_size", size, "train.micro_batch_size", dp):
            problems.append(found)
            break
    cases = [("train.global_batch_size", train.global_batch_size, "train.micro_batch_size")]
    is_like_train = (val.eval_global_batch_size, val.eval_micro_batch_size) == (
        train.global_batch_size,
        train.micro_batch_size,
    )
    if val.eval_iters and not is_like_train:
        eval_size = val.eval_global_batch_size
        cases.append(("validation.eval_global_batch_size", eval_size, "validation.eval_micro_batch_size"))
    return problems + [found for case in cases if (found := _batch_problem(cfg, *case, dp))]


def _batch_problem(cfg: RunConfig, name: str, size: int, micro_name: str, dp: int | None) -> Problem | None:
    section, micro_field = micro_name.split(".")
    unit = getattr(getattr(cfg, section), micro_field) * (dp or 1)
    subject = f"size {size} " if name == "train.rampup_batch_size" else ""
    if size % unit:
        replicas = "" if dp is None else f" x {dp} data parallel ranks = {unit}"
        rule = (
            f"{subject}must be divisible by {{{micro_name}=}}{replicas}; {max(1, round(size / unit)) * unit} would be"
        )
        return problem(cfg, name, rule)
    pp, vp = cfg.model.pipeline_model_parallel_size, cfg.model.virtual_pipeline_model_parallel_size
    if vp > 1 and (size // unit) % pp:  # over one rank it must hold too, or it holds over no number of them
        whose = "" if dp is None else " for each rank"
        rule = (
            f"{subject}makes {size // unit} micro-batches{whose}; the interleaved schedule "
            "({model.virtual_pipeline_model_parallel_size=}) needs a multiple of {model.pipeline_model_parallel_size=}"
        )
        return problem(cfg, name, rule)
    return None


def _stage_sizes(model: ModelConfig) -> tuple[int, int]:
    """Ranks that one replica of a stage's dense parts takes, and one of its experts; `model` may be unfinalized."""
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    expert_tp = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    return dense, expert_tp * model.expert_model_parallel_size


def minimum_world_size(model: ModelConfig) -> int:
    """Ranks that one replica of the model takes, dense and expert grids together."""
    return math.lcm(*_stage_sizes(model)) * model.pipeline_model_parallel_size


def rank_order_problems(cfg: RunConfig) -> list[Problem]:
    """Whether dense parts and experts have the same pipeline groups in the order of ranks."""
    dense, expert = _stage_sizes(cfg.model)
    if not cfg.dist.use_tp_pp_dp_mapping or cfg.model.pipeline_model_parallel_size == 1 or dense == expert:
        return []
    rule = (
        "needs as many data parallel ranks for dense parts as for experts, so "
        "{model.tensor_model_parallel_size=} x {model.context_parallel_size=} must equal "
        "{model.expert_tensor_parallel_size=} x {model.expert_model_parallel_size=}"
    )
    return [problem(cfg, "dist.use_tp_pp_dp_mapping", rule, "Set it to False.")]


def world_problems(cfg: RunConfig, world_size: int) -> list[Problem]:
    """Whether the sizes fit `world_size` ranks, and the batches its data parallel ranks."""
    model = cfg.model
    pp, need = model.pipeline_model_parallel_size, minimum_world_size(model)
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    etp, ep = model.expert_tensor_parallel_size, model.expert_model_parallel_size
    if not WORLD_SIZES.holds(world_size):
        remedy = "Give the number of processes."
        rule = WORLD_SIZES.rule(world_size)
        return [Problem(fields=("world_size",), value=world_size, rule=rule, remedy=remedy)]
    if world_size % need:
        sizes = [f"model.{kind}_parallel_size" for kind in ("tensor_model", "context", "expert_model", "expert_tensor")]
        return [
            Problem(
                fields=("world_size", "model.pipeline_model_parallel_size", *sizes),
                value=world_size,
                rule=f"must be a multiple of {need}, from tensor {tp} x context {cp} x pipeline {pp}, and for experts "
                f"{etp} x {ep} x pipeline {pp}",
                remedy=f"Start a multiple of {need} processes (--nproc {need}, or torchrun), or lower a parallel size.",
            )
        ]
    problems = batch_problems(cfg, world_size // (tp * cp * pp))
    prof = cfg.profiling
    if prof.use_pytorch_profiler and any(rank >= world_size for rank in prof.profile_ranks):
        rule = f"ranks must be below the world size {world_size}"
        problems.append(problem(cfg, "profiling.profile_ranks", rule))
    return problems
