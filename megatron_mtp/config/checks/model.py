"""Checks inside the model: architecture, experts, multi-token prediction. They expect values inside their ranges."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_mtp.config.filled import filled
from megatron_mtp.config.knob import broken_rule
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.problem import problem, refusal
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import ConfigError, Problem, nearest

MTP_VARIANTS = ("sequential", "parallel")


def model_problems(model: ModelConfig) -> list[Problem]:
    """Every rule that reads the model alone."""
    return _architecture_problems(model) + _moe_problems(model) + _mtp_problems(model)


def _architecture_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    if model.num_attention_heads % model.num_query_groups:
        problems.append(problem(model, "model.num_attention_heads", "must be a multiple of {model.num_query_groups=}"))
    problems += _mla_problems(model) if model.multi_latent_attention else _head_problems(model)
    problems += _linear_attention_problems(model)
    if model.mtp_num_layers >= model.seq_length:
        rule = "must be above {model.mtp_num_layers=}, or the last depth has no target"
        problems.append(problem(model, "model.seq_length", rule))
    return problems


def _head_problems(model: ModelConfig) -> list[Problem]:
    if model.position_embedding_type != "rope":
        return []
    if model.rotary_percent == 0:
        return [problem(model, "model.rotary_percent", "must be above 0 with {model.position_embedding_type=}")]
    if int(model.kv_channels * model.rotary_percent) % 2:
        rule = "RoPE rotates pairs of channels, so {model.rotary_percent=} of them must be an even number"
        return [problem(model, "model.kv_channels", rule)]
    return []


def _mla_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    if model.num_query_groups != model.num_attention_heads:
        rule = "multi-latent attention has no groups; it must equal {model.num_attention_heads=}"
        problems.append(problem(model, "model.num_query_groups", rule, "Leave it unset."))
    if model.position_embedding_type != "rope":
        rule = "multi-latent attention always rotates part of each head"
        problems.append(problem(model, "model.position_embedding_type", rule, "Use 'rope'."))
    if model.rope_scaling:
        rule = "multi-latent attention scales by model.rope_type = 'yarn' instead"
        problems.append(problem(model, "model.rope_scaling", rule))
    for name in ("attention_output_gate", "experimental_attention_variant"):
        if getattr(model, name):
            rule = "has no form for multi-latent attention"
            problems.append(problem(model, f"model.{name}", rule, "Leave it unset."))
    if model.rope_type == "yarn" and model.beta_fast <= model.beta_slow:
        problems.append(problem(model, "model.beta_fast", "must be above {model.beta_slow=}"))
    if model.rope_type == "rope" and model.mscale_all_dim:
        rule = "belongs to {model.rope_type} = 'yarn'; Megatron-Core would scale the softmax by it without YaRN too"
        problems.append(problem(model, "model.mscale_all_dim", rule, "Use 0."))
    if model.qk_pos_emb_head_dim % 2:
        problems.append(problem(model, "model.qk_pos_emb_head_dim", "must be even: RoPE rotates pairs of channels"))
    return problems


def _linear_attention_problems(model: ModelConfig) -> list[Problem]:
    freq, name = model.linear_attention_freq, "model.linear_attention_freq"
    if model.experimental_attention_variant is None:
        if freq is None:
            return []
        return [problem(model, name, "needs {model.experimental_attention_variant} = 'gated_delta_net'")]
    problems = []
    if freq is None:
        rule = "must be set with {model.experimental_attention_variant=}"
        problems.append(problem(model, name, rule, "Set it to 4, for example."))
    elif isinstance(freq, int):
        problems += [problem(model, name, "must be at least 2")] if freq < 2 else []
    elif set(freq) - {0, 1} or len(freq) != model.num_layers:
        rule = "must hold 1 (linear) or 0 (full attention) for each layer of {model.num_layers=}"
        problems.append(problem(model, name, rule))
    if model.linear_num_value_heads % model.linear_num_key_heads:
        rule = "must be a multiple of {model.linear_num_key_heads=}"
        problems.append(problem(model, "model.linear_num_value_heads", rule))
    if model.activation_func != "silu":
        rule = "the convolution of {model.experimental_attention_variant=} is built with 'silu' only"
        problems.append(problem(model, "model.activation_func", rule))
    return problems


def _moe_problems(model: ModelConfig) -> list[Problem]:
    if model.num_moe_experts is None:
        return _dense_problems(model)
    problems = _freq_problems(model) + _group_problems(model) + _balancing_problems(model)
    if model.moe_router_topk > model.num_moe_experts:
        problems.append(problem(model, "model.moe_router_topk", "must not be above {model.num_moe_experts=}"))
    if model.moe_router_topk == 1 and model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
        problems.append(
            problem(
                model,
                "model.moe_router_topk",
                "a softmax over one chosen expert is always 1 and gives the router no gradient "
                "({model.moe_router_pre_softmax=}, {model.moe_router_score_function=})",
                "Set model.moe_router_pre_softmax = True, or use 'sigmoid' scores.",
            )
        )
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        rule = "needs {model.moe_shared_expert_intermediate_size}"
        problems.append(problem(model, "model.moe_shared_expert_gate", rule))
    if model.add_bias_linear and model.moe_shared_expert_intermediate_size is not None:
        rule = "shared experts ({model.moe_shared_expert_intermediate_size=}) have no biases"
        problems.append(problem(model, "model.add_bias_linear", rule, "Set it to False."))
    if model.add_bias_linear and model.expert_tensor_parallel_size > 1:
        rule = "biases in experts need {model.expert_tensor_parallel_size} = 1, not {etp}"
        problems.append(problem(model, "model.add_bias_linear", rule, etp=model.expert_tensor_parallel_size))
    return problems


def _dense_problems(model: ModelConfig) -> list[Problem]:
    rule = "there are no experts: {model.num_moe_experts} is not set"
    return [
        problem(model, f"model.{name}", rule, "Set it, or remove this field.")
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_layer_mlp")
        if getattr(model, name) is not None
    ]


def _freq_problems(model: ModelConfig) -> list[Problem]:
    freq, name = model.moe_layer_freq, "model.moe_layer_freq"
    if isinstance(freq, int):
        return [] if freq >= 1 else [problem(model, name, "must be 1 (every layer) or more")]
    if set(freq) - {0, 1}:
        return [problem(model, name, "must hold 0 (dense) and 1 (experts) only")]
    if len(freq) != model.num_layers:
        num_dense = next((idx for idx, kind in enumerate(freq) if kind), len(freq))
        example = ([0] * num_dense + [1] * model.num_layers)[: model.num_layers]
        rule = "must hold one entry for each layer of {model.num_layers=}, not {count}"
        remedy = "With the first {num_dense} dense: {example}."
        return [problem(model, name, rule, remedy, count=len(freq), num_dense=num_dense, example=example)]
    return []


def _group_problems(model: ModelConfig) -> list[Problem]:
    groups, group_topk, experts = (
        model.moe_router_num_groups,
        model.moe_router_group_topk,
        filled(model.num_moe_experts),
    )
    if groups is None and group_topk is None:
        return []
    if groups is None or group_topk is None:
        rule = "must be set together with {model.moe_router_group_topk=}, or neither"
        return [problem(model, "model.moe_router_num_groups", rule)]
    if experts % groups:
        return [problem(model, "model.moe_router_num_groups", "must divide {model.num_moe_experts=}")]
    problems = []
    if group_topk > groups:
        problems.append(
            problem(model, "model.moe_router_group_topk", "must not be above {model.moe_router_num_groups=}")
        )
    most = group_topk * (experts // groups)
    if not group_topk <= model.moe_router_topk <= most:
        rule = (
            "must be from {few} to {most} with {model.moe_router_group_topk=}, {model.moe_router_num_groups=} and "
            "{model.num_moe_experts=}"
        )
        problems.append(problem(model, "model.moe_router_topk", rule, few=group_topk, most=most))
    return problems


def _balancing_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        rule = "needs {model.moe_router_score_function} = 'sigmoid', not {scores}"
        scores = repr(model.moe_router_score_function)
        problems.append(problem(model, "model.moe_router_enable_expert_bias", rule, scores=scores))
    if model.moe_aux_loss_coeff and model.moe_router_load_balancing_type == "none":
        rule = "has no effect with {model.moe_router_load_balancing_type=}"
        remedy = "Choose 'seq_aux_loss' or 'aux_loss', or set it to 0."
        problems.append(problem(model, "model.moe_aux_loss_coeff", rule, remedy))
    return problems


def _mtp_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    try:
        extremes = list(LossFactor.parse(model.mtp_loss_scaling_factor).extremes)
        if rule := broken_rule(ModelConfig, "mtp_loss_scaling_factor", extremes):
            problems.append(problem(model, "model.mtp_loss_scaling_factor", f"each factor {rule}"))
    except ConfigError as error:
        problems += [replace(found, fields=("model.mtp_loss_scaling_factor",)) for found in error.problems]
    weights = model.mtp_depth_weights
    if weights is not None and len(weights) != model.mtp_num_layers:
        rule = "must hold one weight for each depth of {model.mtp_num_layers=}, or be null"
        problems.append(problem(model, "model.mtp_depth_weights", rule))
    if model.mtp_variant not in MTP_VARIANTS and not re.fullmatch(r"[\w.]+:\w+", model.mtp_variant):
        rule = "must be 'sequential', 'parallel', or module:NAME of a variant of your own (docs/extending.md)"
        remedy = nearest(model.mtp_variant, MTP_VARIANTS).strip()
        problems.append(problem(model, "model.mtp_variant", rule, remedy))
    if model.mtp_ffn_hidden_size is not None and model.mtp_layer_mlp is None:
        rule = "needs {model.mtp_layer_mlp} = 'dense'; other MTP layers are as the trunk's last layer"
        problems.append(problem(model, "model.mtp_ffn_hidden_size", rule))
    if model.mtp_freeze_trunk and not model.mtp_num_layers:
        rule = "with {model.mtp_num_layers=} nothing would be trained"
        problems.append(problem(model, "model.mtp_freeze_trunk", rule))
    return problems


def model_refusals(model: ModelConfig) -> list[Problem]:
    """Combinations inside the model that are refused by name."""
    refused = []
    if model.moe_token_dispatcher_type == "flex":
        rule = "the flex dispatcher (DeepEP, HybridEP, NCCL EP) has not been built and checked here"
        refused.append(refusal(model, "model.moe_token_dispatcher_type", rule, "Use 'alltoall'."))
    if model.mtp_num_layers and model.position_embedding_type == "learned_absolute":
        rule = (
            "MTP layers ({model.mtp_num_layers=}) read the token k ahead at position i, which a table of positions "
            "does not describe"
        )
        remedy = "Use 'rope' or 'none', or turn MTP off."
        refused.append(refusal(model, "model.position_embedding_type", rule, remedy))
    if model.mtp_num_layers and model.mtp_variant == "parallel" and model.mtp_use_repeated_layer:
        rule = "with {model.mtp_variant=} one layer would give every depth the same hidden state"
        remedy = "Use 'sequential', or separate layers."
        refused.append(refusal(model, "model.mtp_use_repeated_layer", rule, remedy))
    return refused
