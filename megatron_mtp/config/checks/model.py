"""Checks inside the model: architecture, experts, multi-token prediction. Each problem is a complete message."""

from __future__ import annotations

import math

from megatron_mtp.config.base import Section
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import ConfigError

POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "rotary_base",
    "rope_scaling_factor",
    "layernorm_epsilon",
    "init_method_std",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "latent_norm_epsilon",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_expert_capacity_factor",
    "logits_chunk_tokens",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "recompute_num_layers",
)
NOT_NEGATIVE = (
    "mtp_num_layers",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "logits_z_loss_coeff",
)


def range_problems(section: Section, positive: tuple[str, ...], not_negative: tuple[str, ...]) -> dict[str, str]:
    """Fields that must be finite and above, or not below, zero; None passes.

    Returns:
        Problems by the name of the field. Such a field is set to 1 or 0, so that later checks can divide by it.
    """
    problems = {}
    for name in (*positive, *not_negative):
        value = getattr(section, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
            rule = "must be above 0" if name in positive else "must not be negative"
            problems[f"{section.SECTION}.{name}"] = f"{section.SECTION}.{name} = {value}: {rule}."
            setattr(section, name, int(name in positive))
    return problems


def architecture_problems(model: ModelConfig) -> list[str]:
    """Widths, heads, positions, MLA. Expects positive sizes."""
    problems = []
    if model.num_attention_heads % model.num_query_groups:
        problems.append(
            f"model.num_attention_heads = {model.num_attention_heads}: must be a multiple of model.num_query_groups = "
            f"{model.num_query_groups}."
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(model, name) < 1:
            problems.append(f"model.{name} = {getattr(model, name)}: must be from 0 to below 1.")
    problems += _mla_problems(model) if model.multi_latent_attention else _head_problems(model)
    problems += _linear_attention_problems(model)
    if model.mtp_num_layers >= model.seq_length:
        problems.append(
            f"model.seq_length = {model.seq_length}: must be above model.mtp_num_layers = {model.mtp_num_layers}, or the "
            "last depth has no target."
        )
    return problems


def _head_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.position_embedding_type == "rope":
        if not 0 < model.rotary_percent <= 1:
            problems.append(f"model.rotary_percent = {model.rotary_percent}: must be above 0 and at most 1.")
        elif int(model.kv_channels * model.rotary_percent) % 2:
            problems.append(
                f"model.kv_channels = {model.kv_channels} x model.rotary_percent = {model.rotary_percent}: RoPE turns "
                "pairs of channels, so it needs an even number."
            )
    return problems


def _mla_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.num_query_groups != model.num_attention_heads:
        problems.append(
            f"model.num_query_groups = {model.num_query_groups}: multi-latent attention has no groups; it must equal "
            f"model.num_attention_heads = {model.num_attention_heads}. Leave it unset."
        )
    if model.position_embedding_type != "rope":
        problems.append(
            f"model.position_embedding_type = {model.position_embedding_type!r}: multi-latent attention always turns "
            "part of each head. Use 'rope'."
        )
    if model.rope_scaling:
        problems.append("model.rope_scaling = True: multi-latent attention scales by model.rope_type = 'yarn' instead.")
    for name in ("attention_output_gate", "experimental_attention_variant"):
        if value := getattr(model, name):
            problems.append(f"model.{name} = {value!r}: multi-latent attention has no such form. Leave it unset.")
    if model.qk_pos_emb_head_dim % 2:
        problems.append(
            f"model.qk_pos_emb_head_dim = {model.qk_pos_emb_head_dim}: RoPE turns pairs, so it must be even."
        )
    return problems


def _linear_attention_problems(model: ModelConfig) -> list[str]:
    freq = model.linear_attention_freq
    if model.experimental_attention_variant is None:
        if freq is None:
            return []
        return [
            f"model.linear_attention_freq = {freq}: needs model.experimental_attention_variant = 'gated_delta_net'."
        ]
    problems = []
    if freq is None:
        problems.append(
            "model.linear_attention_freq: model.experimental_attention_variant = 'gated_delta_net' needs it, for example 4."
        )
    elif isinstance(freq, int):
        problems += [f"model.linear_attention_freq = {freq}: must be 2 or more."] if freq < 2 else []
    elif set(freq) - {0, 1} or len(freq) != model.num_layers:
        problems.append(
            f"model.linear_attention_freq = {freq}: a list holds 1 (linear) or 0 (full attention) for each of "
            f"model.num_layers = {model.num_layers} layers."
        )
    if model.linear_num_value_heads % model.linear_num_key_heads:
        problems.append(
            f"model.linear_num_value_heads = {model.linear_num_value_heads}: must be a multiple of "
            f"model.linear_num_key_heads = {model.linear_num_key_heads}."
        )
    if model.activation_func != "silu":
        problems.append(
            f"model.activation_func = {model.activation_func!r}: the convolution of the gated delta net is built with "
            "'silu' only."
        )
    return problems


def moe_problems(model: ModelConfig) -> list[str]:
    """Experts and router. Expects positive sizes."""
    if model.num_moe_experts is None:
        return _dense_problems(model)
    problems = _freq_problems(model) + _group_problems(model) + _balancing_problems(model)
    if model.moe_router_topk > model.num_moe_experts:
        problems.append(
            f"model.moe_router_topk = {model.moe_router_topk}: there are only model.num_moe_experts = "
            f"{model.num_moe_experts} experts."
        )
    if model.moe_router_topk == 1 and model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
        problems.append(
            "model.moe_router_topk = 1: a softmax over one chosen expert is always 1 and gives the router no gradient. "
            "Set model.moe_router_pre_softmax = True, or use 'sigmoid' scores."
        )
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        problems.append("model.moe_shared_expert_gate = True: needs model.moe_shared_expert_intermediate_size.")
    if model.add_bias_linear and model.moe_shared_expert_intermediate_size is not None:
        problems.append("model.add_bias_linear = True: shared experts have no biases. Set it to False.")
    if model.add_bias_linear and model.expert_tensor_parallel_size > 1:
        problems.append(
            f"model.add_bias_linear = True: biases in experts need model.expert_tensor_parallel_size = 1, not "
            f"{model.expert_tensor_parallel_size}."
        )
    return problems


def _dense_problems(model: ModelConfig) -> list[str]:
    return [
        f"model.{name} = {getattr(model, name)}: model.num_moe_experts is not set, so there are no experts. "
        "Set it, or remove this field."
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        if getattr(model, name) is not None
    ]


def _freq_problems(model: ModelConfig) -> list[str]:
    freq = model.moe_layer_freq
    if isinstance(freq, int):
        return [] if freq >= 1 else [f"model.moe_layer_freq = {freq}: must be 1 (every layer) or more."]
    if set(freq) - {0, 1}:
        return [f"model.moe_layer_freq = {freq}: a list holds 0 (dense) and 1 (experts) only."]
    if len(freq) != model.num_layers:
        num_dense = next((idx for idx, kind in enumerate(freq) if kind), len(freq))
        example = ([0] * num_dense + [1] * model.num_layers)[: model.num_layers]
        return [
            f"model.moe_layer_freq has {len(freq)} entries; it needs one for each of model.num_layers = "
            f"{model.num_layers}. With the first {num_dense} dense: {example}."
        ]
    return []


def _group_problems(model: ModelConfig) -> list[str]:
    groups, group_topk, topk = model.moe_router_num_groups, model.moe_router_group_topk, model.moe_router_topk
    if groups is None and group_topk is None:
        return []
    if groups is None or group_topk is None:
        return ["model.moe_router_num_groups and model.moe_router_group_topk: give both, or neither."]
    if model.num_moe_experts % groups:
        return [f"model.moe_router_num_groups = {groups}: must divide model.num_moe_experts = {model.num_moe_experts}."]
    problems = []
    if group_topk > groups:
        problems.append(f"model.moe_router_group_topk = {group_topk}: there are only {groups} groups.")
    if not group_topk <= topk <= group_topk * (model.num_moe_experts // groups):
        problems.append(
            f"model.moe_router_topk = {topk}: with {group_topk} groups of {model.num_moe_experts // groups} experts a token "
            f"can use from {group_topk} to {group_topk * (model.num_moe_experts // groups)} experts."
        )
    return problems


def _balancing_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        problems.append(
            f"model.moe_router_enable_expert_bias = True: needs model.moe_router_score_function = 'sigmoid', not "
            f"{model.moe_router_score_function!r}."
        )
    if model.moe_aux_loss_coeff and model.moe_router_load_balancing_type == "none":
        problems.append(
            f"model.moe_aux_loss_coeff = {model.moe_aux_loss_coeff}: has no effect with "
            "model.moe_router_load_balancing_type = 'none'. Choose 'seq_aux_loss' or 'aux_loss', or set it to 0."
        )
    return problems


def mtp_problems(model: ModelConfig) -> list[str]:
    """Depths, weights, loss factor, variants."""
    problems = []
    depths = model.mtp_num_layers
    try:
        LossFactor.parse(model.mtp_loss_scaling_factor)
    except ConfigError as error:
        problems.append(f"model.mtp_loss_scaling_factor = {error}")
    weights = model.mtp_depth_weights
    if weights is not None and len(weights) != depths:
        problems.append(
            f"model.mtp_depth_weights = {weights} has {len(weights)} entries; model.mtp_num_layers = {depths}. "
            "Give one weight for each depth, or null."
        )
    if weights is not None and not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        problems.append(f"model.mtp_depth_weights = {weights}: weights must be finite and not negative.")
    if model.mtp_freeze_trunk and not depths:
        problems.append("model.mtp_freeze_trunk = True: with model.mtp_num_layers = 0 nothing would be trained.")
    return problems


def refused_in_model(model: ModelConfig) -> list[str]:
    """Combinations that are refused by name."""
    refused = []
    if model.mtp_num_layers and model.position_embedding_type == "learned_absolute":
        refused.append(
            f"model.position_embedding_type = 'learned_absolute': MTP layers read the token k ahead at position i, which a "
            f"table of positions does not describe; model.mtp_num_layers = {model.mtp_num_layers}. Use 'rope' or 'none', or "
            "turn MTP off."
        )
    if model.mtp_num_layers and model.mtp_variant == "parallel" and model.mtp_use_repeated_layer:
        refused.append(
            "model.mtp_use_repeated_layer = True: with model.mtp_variant = 'parallel' one layer would give every depth the "
            "same hidden state. Use 'sequential', or separate layers."
        )
    return refused
