"""config.json <-> ModelConfig, for every family in hf_families. Needs no torch.

Nothing is lost silently: a config is written only if reading it back gives the same architecture, and a file that needs
something unsupported is refused by the name of its key.
"""

from __future__ import annotations

from typing import Any

from megatron_mtp.config.filled import filled
from megatron_mtp.config.mcore.effects import changed_function
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_families import ARCHITECTURE, DEFAULTS, Family, family_of, find_family
from megatron_mtp.convert.hf_rope import rope_from_hf, rope_to_hf
from megatron_mtp.errors import ConversionError
from megatron_mtp.parallel.params import linear_pattern, moe_pattern

PRETRAINING_LENGTH = 4096
"""Largest seq_length of an imported model."""


def hf_config_dict(model: ModelConfig, family: str | None = None) -> dict[str, Any]:
    """The architecture as in config.json of transformers 5, without dtype and special tokens.

    Args:
        model: finalized, with a known vocabulary size.
        family: None: `family_of(model)`.

    Raises:
        ConversionError: names every field that the family cannot hold.
    """
    name = family or family_of(model)
    form = find_family(name)
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": name, "hidden_act": "silu"}
    config |= {key: getattr(model, ours) for key, ours in form.keys.items()}
    config |= form.theirs
    if model.multi_latent_attention:
        config["num_key_value_heads"] = model.num_attention_heads
    config |= rope_to_hf(model, form) | _experts_to_hf(model, form)
    if model.experimental_attention_variant is not None:
        config["layer_types"] = ["linear_attention" if linear else "full_attention" for linear in linear_pattern(model)]
    config[form.mtp_key] = model.mtp_num_layers
    _require_carried(model, model_config_from_hf(config), name)
    return config


def model_config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes, for one rank. Balancing losses and MTP's weights have our defaults.

    Args:
        config: content of config.json, also in the older form with rope_theta and rope_scaling.

    Raises:
        ConversionError: the family is unknown, a key is missing, or a key needs something that is not supported.
    """
    model_type = config.get("model_type")
    form = find_family(str(model_type))
    if "num_experts" in form.keys and "num_local_experts" in config:  # transformers 5 writes this and reads both
        config = {"num_experts": config["num_local_experts"], **config}
    _refuse_unsupported(config, form)
    model = ModelConfig(**form.ours)
    missing = [key for key in form.keys if key not in config and key not in DEFAULTS and key not in _DERIVED]
    if missing:
        raise ConversionError(f"config.json of {model_type}: has no {', '.join(missing)}.")
    for key, ours in form.keys.items():
        setattr(model, ours, config.get(key, DEFAULTS.get(key)))
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.kv_channels is None and model.num_attention_heads:
        model.kv_channels = model.hidden_size // model.num_attention_heads
    rope_from_hf(config, model, form)
    _experts_from_hf(config, model, form)
    if model.experimental_attention_variant is not None:
        model.linear_attention_freq = _linear_layers(config)
    model.mtp_num_layers = config.get(form.mtp_key) or 0
    model.seq_length = min(config.get("max_position_embeddings") or PRETRAINING_LENGTH, PRETRAINING_LENGTH)
    return model


_DERIVED = ("num_key_value_heads", "head_dim")
"""Keys that follow from others if they are missing or null."""


def _refuse_unsupported(config: dict[str, Any], form: Family) -> None:
    wanted = form.theirs | {"hidden_act": "silu", "quantization_config": None, "attention_dropout": 0.0}
    wrong = [
        f"{key} = {config[key]!r}, and only {value!r} is supported"
        for key, value in wanted.items()
        if config.get(key, value) != value and config[key] is not None
    ]
    if wrong:
        raise ConversionError(f"config.json of {config['model_type']}: {'; '.join(wrong)}.")


def _experts_to_hf(model: ModelConfig, form: Family) -> dict[str, Any]:
    if "num_moe_experts" not in form.keys.values():
        return {}
    config: dict[str, Any] = {}
    dense = [idx for idx, is_moe in enumerate(moe_pattern(model)) if not is_moe]
    if form.dense_layers == "first":
        config["first_k_dense_replace"] = len(dense)
        config["routed_scaling_factor"] = model.moe_router_topk_scaling_factor or 1.0
    elif form.dense_layers == "listed":
        config["mlp_only_layers"] = dense
    if form.shared_experts == "count":
        config["n_shared_experts"] = (model.moe_shared_expert_intermediate_size or 0) // filled(
            model.moe_ffn_hidden_size
        )
    elif form.shared_experts == "width":
        config["shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    if form.has_routing_groups:
        config |= {"n_group": model.moe_router_num_groups or 1, "topk_group": model.moe_router_group_topk or 1}
        _require_two_best_of_group(config["n_group"], config["topk_group"], model.moe_router_topk)
    if form.dense_layers != "first":
        config["router_aux_loss_coef"] = model.moe_aux_loss_coeff
    return config


def _experts_from_hf(config: dict[str, Any], model: ModelConfig, form: Family) -> None:
    if model.num_moe_experts is None:
        return
    if "moe_intermediate_size" not in form.keys:
        model.moe_ffn_hidden_size = model.ffn_hidden_size
    num_dense = config.get("first_k_dense_replace") or 0
    dense = set(config.get("mlp_only_layers") or []) if form.dense_layers == "listed" else set(range(num_dense))
    model.moe_layer_freq = [int(idx not in dense) for idx in range(model.num_layers)] if dense else 1
    if form.shared_experts == "count" and config.get("n_shared_experts"):
        model.moe_shared_expert_intermediate_size = config["n_shared_experts"] * model.moe_ffn_hidden_size
    elif form.shared_experts == "width":
        model.moe_shared_expert_intermediate_size = config.get("shared_expert_intermediate_size")
    scaling = config.get("routed_scaling_factor") or 1.0
    model.moe_router_topk_scaling_factor = None if scaling == 1.0 else scaling
    if form.has_routing_groups and (config.get("n_group") or 1) > 1:
        _require_two_best_of_group(config["n_group"], config.get("topk_group") or 1, model.moe_router_topk)
        model.moe_router_num_groups, model.moe_router_group_topk = config["n_group"], config.get("topk_group")


def _require_two_best_of_group(num_groups: int, group_topk: int, topk: int) -> None:
    """transformers scores a group of experts by its best two, Megatron-Core by its best topk / group_topk."""
    if num_groups > 1 and topk // group_topk != 2:
        raise ConversionError(
            f"num_experts_per_tok = {topk} with topk_group = {group_topk}: Megatron-Core scores each of the "
            f"{num_groups} groups by its best {topk // group_topk} experts, the Hugging Face class by its best 2. "
            "They agree only if num_experts_per_tok is twice topk_group."
        )


def _linear_layers(config: dict[str, Any]) -> int | list[int]:
    if config.get("layer_types") is None:
        return config.get("full_attention_interval", 4)
    return [int(kind == "linear_attention") for kind in config["layer_types"]]


def _require_carried(model: ModelConfig, read_back: ModelConfig, family: str) -> None:
    lost = [
        f"model.mcore.{name} = {value!r}: config.json has no such key."
        for name, value in changed_function(model).items()
    ]
    for name in ARCHITECTURE:
        ours, theirs = _meaning(model, name), _meaning(read_back, name)
        if ours != theirs:
            lost.append(f"model.{name} = {ours!r}: files of {family} have {theirs!r}.")
    if lost:
        raise ConversionError(" ".join([*lost, "Try another --family; if none fits, the model cannot be exported."]))


def _meaning(model: ModelConfig, name: str) -> Any:
    """A field's value, or None if the other fields make it meaningless."""
    if name == "moe_layer_freq":
        return moe_pattern(model)
    if name == "linear_attention_freq":
        return linear_pattern(model)
    if name == "latent_norm_epsilon" and model.multi_latent_attention:
        return model.latent_norm_epsilon or model.layernorm_epsilon
    if name == "moe_router_topk_scaling_factor":
        return getattr(model, name) or 1.0
    if (name, model.moe_router_num_groups) in (("moe_router_num_groups", 1), ("moe_router_group_topk", 1)):
        return None  # one group means no groups
    if name in ("mtp_variant", "mtp_hidden_source") and not model.mtp_num_layers:
        return None
    switch = next((on for prefixes, on in _SWITCHES if name.startswith(prefixes)), None)
    return None if switch is not None and not switch(model) else getattr(model, name)


_SWITCHES = (
    (("kv_channels", "num_query_groups", "rotary_percent"), lambda model: not model.multi_latent_attention),
    (
        ("rotary_scaling_factor", "original_max_position_embeddings", "beta_", "mscale"),
        lambda model: model.multi_latent_attention and model.rope_type == "yarn",
    ),
    (
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos", "v_head_dim", "rope_type", "latent_"),
        lambda model: model.multi_latent_attention,
    ),
    (("rope_scaling_factor",), lambda model: model.rope_scaling),
    (("linear_",), lambda model: model.experimental_attention_variant is not None),
    (("moe_", "num_moe"), lambda model: model.num_moe_experts is not None),
)
"""Prefixes of field names, and the condition under which those fields have a meaning."""
