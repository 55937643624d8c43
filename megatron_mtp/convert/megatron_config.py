"""Settings of Megatron-LM (arguments) and Megatron-Bridge (run_config.yaml) <-> ModelConfig. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from megatron_mtp.config.mcore_table import MCORE_FIELDS
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_families import NOT_ARCHITECTURE
from megatron_mtp.errors import ConversionError

# Megatron-LM's argument -> our field, where the names differ and the meaning is the same.
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
}
_CARRIED = frozenset(
    """seq_length make_vocab_size_divisible_by init_method_std attention_dropout hidden_dropout moe_router_dtype
    moe_router_bias_update_rate moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
    mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads""".split()
)
"""Training settings of ModelConfig that are taken over too."""
_LAYOUT = ("parallel", "recompute", "logits_", "backend", "mcore", "moe_token_dispatcher", "moe_grouped", "mtp_freeze")


def model_from_megatron(given: dict[str, Any]) -> ModelConfig:
    """The model that a checkpoint's settings describe, for one rank; not finalized.

    Args:
        given: Megatron-LM's arguments, or the section `model` of Megatron-Bridge's run_config.yaml.

    Raises:
        ConversionError: a setting is missing, or asks for something that is not supported.
    """
    values = {RENAMED.get(name, name): value for name, value in given.items()}
    values |= _activation(values)
    if "untie_embeddings_and_output_weights" in values:
        values["share_embeddings_and_output_weights"] = not values["untie_embeddings_and_output_weights"]
    if values.get("group_query_attention") is False:
        values["num_query_groups"] = None
    if values.get("num_query_groups") is None:
        values["num_query_groups"] = values.get("num_attention_heads")
    if values.get("multi_latent_attention") and values.get("rope_type") is None:
        values["rope_type"] = "yarn"  # Megatron-Core's default with multi-latent attention
    values |= _vocabulary(values)
    if missing := [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not values.get(name)]:
        raise ConversionError(f"the checkpoint's settings have no {', '.join(missing)}. Name the model with --recipe.")
    model = ModelConfig()
    for field in fields(ModelConfig):
        name = field.name
        if name not in values or name.startswith(_LAYOUT) or (name in NOT_ARCHITECTURE and name not in _CARRIED):
            continue
        if (value := _plain(name, values[name])) is not None:
            setattr(model, name, value)
    if model.num_moe_experts is None:
        model.moe_layer_freq = 1
    model.mcore = _engine_fields(values)
    return model


def _plain(name: str, value: Any) -> Any:
    """A value as our field takes it; None: leave the default."""
    if name == "moe_layer_freq" and isinstance(value, str):
        return _pattern(value)
    if name == "moe_router_load_balancing_type" and value not in ("none", "aux_loss", "seq_aux_loss"):
        return None
    if name == "position_embedding_type":
        known = {"rope": "rope", "none": "none", "learned_absolute": "learned_absolute"}
        if value not in known:
            raise ConversionError(f"position_embedding_type = {value!r}: only {', '.join(known)} are supported.")
        return value
    if isinstance(value, bool | int | float | str | list):
        return value
    return list(value) if isinstance(value, tuple) else None


def _pattern(text: str) -> Any:
    """Megatron-LM takes "([0]*3+[1]*58)" for moe_layer_freq; only lists of 0 and 1, * and + are read."""
    total: list[int] = []
    for part in text.replace(" ", "").strip("()").split("+"):
        items, _, times = part.partition("*")
        digits = items.strip("[]()").split(",")
        if not all(digit in ("0", "1") for digit in digits) or not (times or "1").isdigit():
            if text.isdigit():
                return int(text)
            raise ConversionError(f"moe_layer_freq = {text!r}: cannot be read. Name the model with --recipe.")
        total += [int(digit) for digit in digits] * int(times or "1")
    return total


def _activation(values: dict[str, Any]) -> dict[str, Any]:
    """Our two fields for Megatron-LM's switches, or for the function that Megatron-Bridge names."""
    if "swiglu" in values:
        if values["swiglu"]:
            return {"gated_linear_unit": True, "activation_func": "silu"}
        name = "squared_relu" if values.get("squared_relu") else "gelu"
        return {"gated_linear_unit": False, "activation_func": name}
    function = values.get("activation_func")
    target = function.get("_target_", "") if isinstance(function, dict) else str(function or "silu")
    name = target.rpartition(".")[2]
    if name not in ("silu", "gelu", "relu", "squared_relu"):
        raise ConversionError(f"activation_func = {target!r}: only silu, gelu, relu and squared_relu are supported.")
    return {"activation_func": name}


def _vocabulary(values: dict[str, Any]) -> dict[str, Any]:
    """Megatron-LM often knows the padded size only; then every row counts as a token."""
    padded, own = values.get("padded_vocab_size"), values.get("vocab_size")
    if own is None and padded is not None:
        return {"vocab_size": padded, "make_vocab_size_divisible_by": math.gcd(padded, 128)}
    return {}


def _engine_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Megatron-Core that ModelConfig does not have, change the function and are not at their default.

    `finalize` refuses those that are not supported by name.
    """
    found = {}
    for name in MCORE_FIELDS:
        value, default = values.get(name), MCORE_FIELDS[name][1]
        if name.startswith(_OF_FUNCTION) and value is not None and value != default:
            found[name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str | list)}


_OF_FUNCTION = tuple(
    """activation_func_clamp_value apply_query_key_layer_scaling apply_residual_connection_post_layernorm
    fp32_residual_connection glu_linear_offset is_hybrid_model mla_down_proj_fusion moe_apply_probs_on_input
    moe_input_jitter_eps moe_latent_size moe_mlp_glu_interleave_size moe_router_force mrope_section no_rope_freq
    qk_clip qk_l2_norm rotary_interleaved softmax_scale softmax_type use_mup window_""".split()
)
"""Beginnings of names of fields that change what a model computes."""


_OURS_ALONE = ("mtp_variant", "mtp_hidden_source", "mtp_depth_weights", "mtp_layer_mlp", "mtp_ffn_hidden_size")
"""Fields that Megatron-LM has no argument for."""


def megatron_args(model: ModelConfig, padded_vocab: int) -> dict[str, Any]:
    """Megatron-LM's arguments for a model of ours, as far as they describe the architecture."""
    names = {ours: theirs for theirs, ours in RENAMED.items()}
    values = {}
    for field in fields(ModelConfig):
        if field.name.startswith(_LAYOUT) or field.name in _OURS_ALONE:
            continue
        values[names.get(field.name, field.name)] = getattr(model, field.name)
    values |= {
        "padded_vocab_size": padded_vocab,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "swiglu": model.gated_linear_unit and model.activation_func == "silu",
        "squared_relu": model.activation_func == "squared_relu",
        "max_position_embeddings": model.seq_length,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "tokenizer_type": None,
        "use_mcore_models": True,
    }
    return values | model.mcore
