"""Checks of placement: does the model divide over the parallel sizes, and do the sizes fit the world."""

from __future__ import annotations

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.config.sections import ModelConfig

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def placement_problems(model: ModelConfig) -> list[str]:
    """Divisions of the model over TP, PP, CP, EP. Expects positive sizes."""
    problems = _tensor_problems(model) + _sequence_problems(model) + _expert_problems(model)
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if vp > 1 and pp == 1:
        problems.append(
            f"model.virtual_pipeline_model_parallel_size = {vp}: the interleaved schedule needs "
            "model.pipeline_model_parallel_size above 1."
        )
        return problems
    _, found = layout_chunks(
        model.pipeline_model_parallel_layout, num_layers=model.num_layers, num_depths=model.mtp_num_layers, pp=pp, vp=vp
    )
    return problems + found


def _tensor_problems(model: ModelConfig) -> list[str]:
    tp, etp = model.tensor_model_parallel_size, model.expert_tensor_parallel_size
    divided = {"num_attention_heads": tp, "ffn_hidden_size": tp, "moe_shared_expert_intermediate_size": tp}
    if model.num_moe_experts is not None:
        divided["moe_ffn_hidden_size"] = etp
    if model.multi_latent_attention:
        divided["q_lora_rank"] = tp
    problems = []
    for name, size in divided.items():
        value = getattr(model, name)
        if value is not None and value % size:
            by = "expert_tensor_parallel_size" if name == "moe_ffn_hidden_size" else "tensor_model_parallel_size"
            problems.append(f"model.{name} = {value}: must be divisible by model.{by} = {size}.")
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        problems.append(
            f"model.num_query_groups = {groups}: must be a multiple or a divisor of model.tensor_model_parallel_size = {tp}."
        )
    if model.experimental_attention_variant is not None:
        problems += _linear_head_problems(model)
    latent = model.kv_lora_rank + model.qk_pos_emb_head_dim
    if model.multi_latent_attention and latent % tp:
        problems.append(
            f"model.kv_lora_rank + model.qk_pos_emb_head_dim = {latent}: must be divisible by "
            f"model.tensor_model_parallel_size = {tp}."
        )
    return problems


def _linear_head_problems(model: ModelConfig) -> list[str]:
    """Linear attention shards its heads over TP and CP: a head reads the whole sequence."""
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    return [
        f"model.{name} = {getattr(model, name)}: must be divisible by model.tensor_model_parallel_size x "
        f"model.context_parallel_size = {tp} x {cp}."
        for name in ("linear_num_key_heads", "linear_num_value_heads")
        if getattr(model, name) % (tp * cp)
    ]


def _sequence_problems(model: ModelConfig) -> list[str]:
    cp, tp, seq = model.context_parallel_size, model.tensor_model_parallel_size, model.seq_length
    problems = []
    if cp > 1 and seq % (2 * cp):
        problems.append(
            f"model.seq_length = {seq}: must be divisible by 2 x model.context_parallel_size = {2 * cp}, because each rank "
            "takes two pieces, one from each end, so that causal attention is balanced."
        )
    elif model.sequence_parallel and (seq // cp) % tp:
        problems.append(
            f"model.seq_length = {seq} / model.context_parallel_size = {cp}: must be divisible by "
            f"model.tensor_model_parallel_size = {tp} under model.sequence_parallel."
        )
    return problems


def _expert_problems(model: ModelConfig) -> list[str]:
    ep = model.expert_model_parallel_size
    if model.num_moe_experts is None:
        if ep > 1:
            return [f"model.expert_model_parallel_size = {ep}: needs experts; model.num_moe_experts is not set."]
        return []
    problems = []
    if model.num_moe_experts % ep:
        problems.append(
            f"model.num_moe_experts = {model.num_moe_experts}: must be divisible by model.expert_model_parallel_size = {ep}."
        )
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        problems.append(
            f"model.sequence_parallel = False: Megatron-Core trains experts under model.tensor_model_parallel_size = "
            f"{model.tensor_model_parallel_size} with sequence parallelism only. Set it to True."
        )
    return problems


def recompute_problems(model: ModelConfig) -> list[str]:
    """Combinations of recompute_*."""
    granularity, method, modules = model.recompute_granularity, model.recompute_method, model.recompute_modules
    given = [
        name
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules")
        if getattr(model, name) is not None
    ]
    if granularity is None:
        return [f"model.{name} = {getattr(model, name)!r}: needs model.recompute_granularity." for name in given]
    if granularity == "full":
        problems = []
        if method is None or model.recompute_num_layers is None:
            problems.append(
                "model.recompute_granularity = 'full': needs model.recompute_method ('uniform' or 'block') and "
                "model.recompute_num_layers."
            )
        if modules is not None:
            problems.append(
                f"model.recompute_modules = {modules}: belongs to model.recompute_granularity = 'selective'."
            )
        return problems
    problems = [
        f"model.{name} = {getattr(model, name)!r}: belongs to model.recompute_granularity = 'full'."
        for name in given
        if name != "recompute_modules"
    ]
    return problems + _module_problems(model)


def _module_problems(model: ModelConfig) -> list[str]:
    needs = {
        "mla_up_proj": (model.multi_latent_attention, "model.multi_latent_attention"),
        "moe": (model.num_moe_experts is not None, "model.num_moe_experts"),
        "moe_act": (model.moe_grouped_gemm is True, "model.moe_grouped_gemm = True"),
        "shared_experts": (model.moe_shared_expert_intermediate_size is not None, "a shared expert"),
    }
    problems = []
    for module in model.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            problems.append(
                f"model.recompute_modules: there is no {module!r}; known are {', '.join(RECOMPUTE_MODULES)}."
            )
        elif not needs.get(module, (True, ""))[0]:
            problems.append(f"model.recompute_modules: {module!r} needs {needs[module][1]}.")
    return problems


def batch_sizes(cfg: ConfigContainer) -> list[int]:
    """Every global batch size a run passes through, from the ramp's start to train.global_batch_size."""
    ramp, final = cfg.train.rampup_batch_size, cfg.train.global_batch_size
    return [final] if ramp is None else [*range(ramp[0], final, ramp[1]), final]


def batch_problems(cfg: ConfigContainer, dp: int | None) -> list[str]:
    """Whether batches divide into micro-batches over `dp` replicas; dp None: over one."""
    problems = []
    train, val = cfg.train, cfg.validation
    cases = [("train.rampup_batch_size, size", size, "train", train.micro_batch_size) for size in batch_sizes(cfg)[:-1]]
    cases.append(("train.global_batch_size", train.global_batch_size, "train", train.micro_batch_size))
    if val.eval_iters:
        cases.append(
            ("validation.eval_global_batch_size", val.eval_global_batch_size, "eval", val.eval_micro_batch_size)
        )
    for name, size, kind, micro in cases:
        micro_name = "train.micro_batch_size" if kind == "train" else "validation.eval_micro_batch_size"
        if kind == "eval" and (size, micro) == (train.global_batch_size, train.micro_batch_size):
            continue
        problems += _batch_problem(cfg, name, size, micro_name, micro, dp)
    return problems


def _batch_problem(
    cfg: ConfigContainer, name: str, size: int, micro_name: str, micro: int, dp: int | None
) -> list[str]:
    unit = micro * (dp or 1)
    if size % unit:
        replicas = "" if dp is None else f" x {dp} data parallel ranks = {unit}"
        nearest = max(1, round(size / unit)) * unit
        return [f"{name} = {size}: must be divisible by {micro_name} = {micro}{replicas}; {nearest} would be."]
    pp = cfg.model.pipeline_model_parallel_size
    if dp is not None and (cfg.model.virtual_pipeline_model_parallel_size or 1) > 1 and (size // unit) % pp:
        return [
            f"{name} = {size}: makes {size // unit} micro-batches for each rank; the interleaved schedule "
            f"(model.virtual_pipeline_model_parallel_size) needs a multiple of model.pipeline_model_parallel_size = {pp}."
        ]
    return []


def minimum_world_size(model: ModelConfig) -> int:
    """Ranks that one replica of the model takes, dense and expert grids together."""
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    expert = (model.expert_tensor_parallel_size or model.tensor_model_parallel_size) * model.expert_model_parallel_size
    smaller, larger = sorted((dense, expert))
    step = larger
    while step % smaller:
        step += larger
    return step * model.pipeline_model_parallel_size


def world_problems(cfg: ConfigContainer, world_size: int) -> list[str]:
    """Whether the sizes fit `world_size` ranks, and the batches its data parallel ranks."""
    model = cfg.model
    pp, need = model.pipeline_model_parallel_size, minimum_world_size(model)
    if world_size < 1 or world_size % need:
        return [
            f"world size {world_size}: must be a multiple of {need}, from tensor {model.tensor_model_parallel_size} x "
            f"context {model.context_parallel_size} x pipeline {pp}, and for experts "
            f"{model.expert_tensor_parallel_size} x {model.expert_model_parallel_size} x pipeline {pp}. "
            f"Start a multiple of {need} processes (--nproc {need}, or torchrun), or lower a parallel size."
        ]
    dp = world_size // (model.tensor_model_parallel_size * model.context_parallel_size * pp)
    problems = batch_problems(cfg, dp)
    expert_dp = world_size // (model.expert_tensor_parallel_size * model.expert_model_parallel_size * pp)
    if cfg.dist.use_tp_pp_dp_mapping and pp > 1 and dp != expert_dp:
        problems.append(
            f"dist.use_tp_pp_dp_mapping = True: needs equally many data parallel ranks for dense parts ({dp}) and experts "
            f"({expert_dp}). Set it to False."
        )
    problems += [
        f"profiling.profile_ranks: rank {rank} does not exist, the world size is {world_size}."
        for rank in cfg.profiling.profile_ranks
        if cfg.profiling.use_pytorch_profiler and rank >= world_size
    ]
    return problems
