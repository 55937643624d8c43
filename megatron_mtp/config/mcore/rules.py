"""What may be written in `model.mcore`: known by name and type, not set by another field, and supported."""

from __future__ import annotations

from typing import Any

from megatron_mtp.config.base import RENAMED
from megatron_mtp.config.coerce import MisfitError, check, field_types
from megatron_mtp.config.filled import filled
from megatron_mtp.config.mcore_table import MCORE_FIELDS, MCORE_VERSION
from megatron_mtp.config.problem import problem, refusal
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.serialize import too_many_names
from megatron_mtp.errors import Problem, nearest

# Fields that follow from another field, which could contradict them, with what to do instead.
OWNED = {
    **{name: RENAMED[name] for name in RENAMED if name in MCORE_FIELDS and name not in ("fp8", "fp4")},
    "autocast_dtype": "Use precision.dtype.",
    "config_logger_dir": "Use logger.log_dir.",
    "deterministic_mode": "Use train.deterministic.",
    "embedding_init_method_std": "Use model.init_method_std.",
    "enable_autocast": "Use precision.dtype.",
    "moe_layer_recompute": "Use model.recompute_modules.",
    "moe_router_topk_limited_devices": "Use model.moe_router_num_groups and model.moe_router_group_topk.",
    "moe_token_dropping": "Use model.moe_expert_capacity_factor.",
    "mtp_hybrid_override_pattern": "Use model.pipeline_model_parallel_layout.",
    "mtp_standalone": "Use model.pipeline_model_parallel_layout.",
}

# Fields that are set when the model is built: process groups, schedules, initial weights, callbacks.
SET_AT_BUILD = {
    "batch_p2p_comm",
    "batch_p2p_sync",
    "deallocate_pipeline_outputs",
    "gradient_accumulation_fusion",
    "init_model_with_meta_device",
    "overlap_p2p_comm",
    "overlap_p2p_comm_warmup_flush",
    "perform_initialization",
    "use_cpu_initialization",
    "use_ring_exchange_p2p",
    "use_te_rng_tracker",
    "variable_seq_lengths",
}

FLEX = "it belongs to the flex dispatcher (DeepEP, HybridEP, NCCL EP), which has not been built and checked here"
# Not built or never checked against the reference model here, by name or by the beginning of the name.
UNSUPPORTED = {
    "cache_mla_latents": "it is for inference",
    "cuda_graph_scope": "it is deprecated; use cuda_graph_modules",
    "delay_wgrad_compute": "it needs the combined 1F1B schedule, which is not built",
    "dsa_": "sparse attention is not built",
    "enable_cuda_graph": "it is deprecated; use cuda_graph_impl",
    "ep_overlap_": "it needs the combined 1F1B schedule, which is not built",
    "expert_gtp_": "sharded weights inside a tensor parallel rank are not built",
    "expert_tensor_parallel_num_weight_shards": "sharded weights inside a tensor parallel rank are not built",
    "external_cuda_graph": "it is deprecated; use cuda_graph_impl",
    "flash_decode": "it is for inference",
    "fp4_quantizer_factory": "a config may not name code to run",
    "fp8_quantizer_factory": "a config may not name code to run",
    "gtp_": "sharded weights inside a tensor parallel rank are not built",
    "hetereogenous_": "layers of different kinds are not built",
    "heterogeneous_": "layers of different kinds are not built",
    "hierarchical_context_parallel_sizes": "hierarchical context parallelism is not built",
    "hybrid_context_parallel": "it is not built; use model.context_parallel_size",
    "inference_": "it is for inference",
    "is_hybrid_model": "hybrid models are not built",
    "mamba_": "hybrid models are not built",
    "mla_down_proj_fusion": "it changes the parameters of MLA",
    "mlp_chunks_for_prefill": "it is for inference",
    "moe_deepep_": FLEX,
    "moe_enable_deepep": FLEX,
    "moe_expert_rank_capacity_factor": FLEX,
    "moe_flex_": FLEX,
    "moe_hybridep_": FLEX,
    "moe_input_jitter_eps": "the curve would depend on the layout",
    "moe_latent_size": "latent experts are not built",
    "moe_ncclep_": FLEX,
    "moe_paged_stash": FLEX,
    "moe_permute_fusion_into_hybridep": FLEX,
    "mrope_section": "multimodal positions are not built",
    "mup_": "muP is not built",
    "overlap_dispatch_backward_with_experts_wgrad": "it is not built",
    "overlap_moe_expert_parallel_comm": "it needs the combined 1F1B schedule, which is not built",
    "qk_clip": "it is not built",
    "qk_l2_norm": "it is not built; use model.qk_layernorm",
    "tp_comm_": "its buffers (Transformer Engine's userbuffers) are made by Megatron-LM's training script only",
    "tensor_parallel_num_weight_shards": "sharded weights inside a tensor parallel rank are not built",
    "use_inference_optimized_layers": "it is for inference",
    "use_kitchen": "it is not built",
    "use_mup": "muP is not built",
}

# Need Transformer Engine's modules or kernels, by name or by the beginning of the name.
TRANSFORMER_ENGINE_ONLY = {
    "apply_rope_fusion": "fused RoPE",
    "attention_backend": "the choice of an attention kernel",
    "batch_invariant_mode": "batch-invariant kernels",
    "cp_comm_type": "the choice of context parallel messages",
    "cpu_offloading": "offloading to the CPU",
    "cuda_graph_": "CUDA graphs",
    "fine_grained_": "offloading of activations",
    "first_last_layers_bf16": "FP8 training",
    "flash_attention_version": "the choice of an attention kernel",
    "fp4": "FP4 training",
    "fp8": "FP8 training",
    "fused_": "fused kernels",
    "moe_permute_fusion": "fused permutation",
    "moe_router_fusion": "a fused router",
    "moe_router_padding_for_": "FP8 training",
    "moe_shared_expert_overlap": "overlap of the shared expert",
    "moe_single_grouped_": "grouped matrix products",
    "softmax_type": "another softmax",
    "symmetric_ar_type": "symmetric memory",
    "use_grouped_gemm_": "grouped matrix products",
    "use_te_activation_func": "fused activations",
    "use_transformer_engine_op_fuser": "fused operations",
    "window_": "sliding-window attention",
}


def mcore_problems(model: ModelConfig) -> list[Problem]:
    """What is wrong in `model.mcore`, mistakes and refusals."""
    found = too_many_names("model.mcore", model.mcore, MCORE_FIELDS)
    for name, value in ({} if found else model.mcore).items():
        field = f"model.mcore.{name}"
        if mistake := _mistake(name, value):
            found.append(problem(model, field, *mistake))
        elif name in SET_AT_BUILD:
            found.append(refusal(model, field, "it is set when the model is built", "Remove it."))
        elif (reason := _lookup(UNSUPPORTED, name)) and value != MCORE_FIELDS[name][1]:
            found.append(refusal(model, field, f"not supported, {reason}", "Remove it."))
    return found + (torch_backend_problems(model) if model.backend == "torch" else [])


def torch_backend_problems(model: ModelConfig) -> list[Problem]:
    """What the plain PyTorch backend cannot do; call it too once backend = "auto" is resolved to torch."""
    problems = []
    for name, value in model.mcore.items():
        feature = _lookup(TRANSFORMER_ENGINE_ONLY, name)
        if feature and _mistake(name, value) is None and value != MCORE_FIELDS[name][1]:
            rule = f"{feature} needs Transformer Engine, and the backend is torch ({{model.backend=}})"
            remedy = "Remove it, or use model.backend = 'transformer_engine' on a GPU."
            problems.append(refusal(model, f"model.mcore.{name}", rule, remedy))
    if model.moe_grouped_gemm and (unfit := unfit_for_grouped_mm(model)):
        remedy = "Leave it unset (each backend then uses its own best form)."
        problems.append(refusal(model, "model.moe_grouped_gemm", unfit, remedy))
    if "moe_act" in (model.recompute_modules or ()):
        rule = "'moe_act' needs Transformer Engine, and the backend is torch ({model.backend=})"
        problems.append(refusal(model, "model.recompute_modules", rule, "Use 'moe'."))
    return problems


GROUPED_MM_MULTIPLE = 8
"""Numbers in 16 bytes of bf16: `torch.nn.functional.grouped_mm` takes rows that are multiples of 16 bytes."""


def unfit_for_grouped_mm(model: ModelConfig) -> str | None:
    """The rule of torch's grouped product that a model breaks, or None."""
    if model.num_moe_experts is None:
        return None
    width = filled(model.moe_ffn_hidden_size) // model.expert_tensor_parallel_size
    if model.hidden_size % GROUPED_MM_MULTIPLE or width % GROUPED_MM_MULTIPLE:
        return (
            "torch's grouped product takes widths that are multiples of 8: {model.hidden_size=}, and "
            "{model.moe_ffn_hidden_size=} over {model.expert_tensor_parallel_size=}"
        )
    return None


def without_transformer_engine(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """A copy that the plain PyTorch backend can build, and the fields left out, on which no parameter depends."""
    plain = model.copy()
    left_out = [f"model.mcore.{name}" for name in model.mcore if _lookup(TRANSFORMER_ENGINE_ONLY, name)]
    plain.mcore = {name: value for name, value in model.mcore.items() if f"model.mcore.{name}" not in left_out}
    if model.moe_grouped_gemm:
        plain.moe_grouped_gemm = None
        left_out.append("model.moe_grouped_gemm")
    plain.backend = "torch"
    return plain, left_out


def _mistake(name: str, value: Any) -> tuple[str, str] | None:
    """Rule and remedy."""
    if name in field_types(ModelConfig):
        return "this is a field of the section model", f"Set model.{name} instead."
    if name in OWNED:
        return "this follows from another field", OWNED[name]
    if name not in MCORE_FIELDS:
        return f"megatron-core {MCORE_VERSION} has no such field", nearest(name, MCORE_FIELDS).strip()
    wanted, _ = MCORE_FIELDS[name]
    if wanted is None:
        return "no value can be given in a config (it is a function or a dtype)", ""
    try:
        check(value, wanted)
    except MisfitError as misfit:
        return str(misfit), ""
    return None


def _lookup(table: dict[str, str], name: str) -> str | None:
    """The entry for `name`, or for a prefix of it that ends in an underscore or stands for a family."""
    return next((text for start, text in table.items() if name == start or name.startswith(start)), None)
