"""config.json <-> ModelConfig, for every family in hf_families. Needs no torch.

Nothing is lost silently: a config is written only if reading it back gives the same architecture, and a file that needs
something unsupported is refused by the name of its key.
"""

from __future__ import annotations

from typing import Any

from megatron_mtp.config.derive import derive_widths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.mcore.effects import changed_function
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_families import ARCHITECTURE, DEFAULTS, FIXED, OUR_MTP_KEYS, Family, family_of, find_family
from megatron_mtp.convert.hf_rope import rope_from_hf, rope_to_hf
from megatron_mtp.convert.quantization import block_of
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
    _require_same_routing(model, form)
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": name, "hidden_act": "silu"}
    config |= {key: getattr(model, ours) for key, ours in form.keys.items()}
    config |= form.theirs
    if model.multi_latent_attention:
        config["num_key_value_heads"] = model.num_attention_heads
    config |= rope_to_hf(model, form) | _experts_to_hf(model, form)
    if "layer_types" in form.defaults and model.experimental_attention_variant is not None:
        config["layer_types"] = ["linear_attention" if linear else "full_attention" for linear in linear_pattern(model)]
    config[form.mtp_key] = model.mtp_num_layers
    if model.mtp_num_layers and model.mtp_layer_mlp is not None and form.mtp_form.is_ours:
        config |= {key: getattr(model, ours) for key, ours in OUR_MTP_KEYS.items()}
    _require_carried(model, model_config_from_hf(config), name)
    return config


def model_config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes, for one rank. Balancing losses and MTP's weights have our defaults.

    Args:
        config: content of config.json, also in the older form with rope_theta and rope_scaling.

    Raises:
        ConversionError: the family is unknown, a key is missing, or a key needs something that is not supported.
    """
    form = find_family(str(config.get("model_type")))
    config = _completed(config, form)
    _refuse_unsupported(config, form)
    block_of(config)
    model = ModelConfig(**form.ours)
    for key, ours in form.keys.items():
        setattr(model, ours, config[key])
    derive_widths(model)  # transformers rounds the width of a head down too
    rope_from_hf(config, model, form)
    _experts_from_hf(config, model, form)
    _require_same_routing(model, form)
    if model.experimental_attention_variant is not None:
        model.linear_attention_freq = _linear_layers(config)
    model.mtp_num_layers = config.get(form.mtp_key) or 0
    if form.mtp_form.is_ours:
        for key, ours in OUR_MTP_KEYS.items():
            setattr(model, ours, config.get(key))
    model.seq_length = min(config.get("max_position_embeddings") or PRETRAINING_LENGTH, PRETRAINING_LENGTH)
    return model


NULL_HAS_A_MEANING = ("q_lora_rank",)
"""Keys whose null says something else than that they are missing."""


def _completed(config: dict[str, Any], form: Family) -> dict[str, Any]:
    """The file's keys by their first names, with what missing ones mean to the family's class of transformers."""
    problems = []
    given = dict(config)
    for second, first in form.renames.items():
        if second not in given:
            continue
        value = given.pop(second)
        if given.setdefault(first, value) != value:
            problems.append(f"{first} = {given[first]!r} and {second} = {value!r} are two names of one number")
    defaults = DEFAULTS | form.theirs | form.defaults
    values = defaults | given
    problems += [f"has no {key}" for key in form.keys if key not in values]
    problems += [
        f"has no {key}, which {form.architecture} of transformers then takes for {default!r}"
        for key, default in form.defaults.items()
        if key not in given and form.theirs.get(key, default) != default
    ]
    problems += [
        f"{key} is null, which has no meaning"
        for key in (*form.keys, *form.defaults)
        if key in given and given[key] is None and key not in NULL_HAS_A_MEANING and defaults.get(key, 0) is not None
    ]
    if problems:
        raise ConversionError(f"config.json of {config['model_type']}: {'; '.join(problems)}.")
    return values


def _refuse_unsupported(config: dict[str, Any], form: Family) -> None:
    wrong = [
        f"{key} = {config[key]!r}, and only {value!r} is supported"
        for key, value in (FIXED | form.theirs).items()
        if config.get(key, value) != value and (config[key] is not None or value)  # null switches off
    ]
    kinds = {"full_attention"} | ({"linear_attention"} if "layer_types" in form.defaults else set())
    if unknown := set(config.get("layer_types") or []) - kinds:
        wrong.append(f"layer_types has {', '.join(map(repr, sorted(unknown)))}, and only {sorted(kinds)} are supported")
    wrong += [
        f"{key} = {config[key]!r}, and with latent attention it repeats {first} = {config[first]!r}"
        for key, first in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"))
        if "kv_lora_rank" in form.keys and config.get(key) not in (None, config[first])
    ]
    if (mlp := config.get("mtp_layer_mlp")) not in (None, "dense"):
        wrong.append(f"mtp_layer_mlp = {mlp!r}, and only 'dense' is supported")
    if form.has_routing_groups and not 1 <= config["topk_group"] <= config["n_group"]:
        wrong.append(f"topk_group = {config['topk_group']}, and it is from 1 to n_group = {config['n_group']}")
    if wrong:
        raise ConversionError(f"config.json of {config['model_type']}: {'; '.join(wrong)}.")


def _experts_to_hf(model: ModelConfig, form: Family) -> dict[str, Any]:
    if not form.has_experts:
        return {}
    config: dict[str, Any] = {}
    dense = [idx for idx, is_moe in enumerate(moe_pattern(model)) if not is_moe]
    if form.dense_layers == "first":
        config["first_k_dense_replace"] = len(dense)
        config["routed_scaling_factor"] = float(model.moe_router_topk_scaling_factor or 1.0)
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
    if form.dense_layers != "first":
        config["router_aux_loss_coef"] = model.moe_aux_loss_coeff
    return config


def _experts_from_hf(config: dict[str, Any], model: ModelConfig, form: Family) -> None:
    if model.num_moe_experts is None:
        return
    if form.dense_layers == "listed":
        dense = set(config["mlp_only_layers"] or [])
    else:
        dense = set(range(config["first_k_dense_replace"])) if form.dense_layers == "first" else set()
    model.moe_layer_freq = [int(idx not in dense) for idx in range(model.num_layers)] if dense else 1
    if form.shared_experts == "count":
        model.moe_shared_expert_intermediate_size = (
            config["n_shared_experts"] * filled(model.moe_ffn_hidden_size) or None
        )
    elif form.shared_experts == "width":
        model.moe_shared_expert_intermediate_size = config["shared_expert_intermediate_size"]
    if form.dense_layers == "first" and config["routed_scaling_factor"] != 1.0:
        model.moe_router_topk_scaling_factor = config["routed_scaling_factor"]
    if form.has_routing_groups and config["n_group"] != 1:
        model.moe_router_num_groups, model.moe_router_group_topk = config["n_group"], config["topk_group"]


def _require_same_routing(model: ModelConfig, form: Family) -> None:
    """Raises ConversionError where Megatron-Core routes in another way than the family's class of transformers."""
    if form.has_experts and model.num_moe_experts is None:
        raise ConversionError(
            f"model.num_moe_experts = None: {form.architecture} has routed experts. Choose another --family."
        )
    groups, group_topk, topk = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1, model.moe_router_topk
    if groups > 1 and topk // group_topk != 2:
        raise ConversionError(
            f"num_experts_per_tok = {topk} with topk_group = {group_topk}, n_group = {groups}: Megatron-Core scores "
            f"each of the {groups} groups by its best {topk // group_topk} experts, the Hugging Face class by its best "
            "2. They agree only if num_experts_per_tok is twice topk_group (moe_router_topk, moe_router_group_topk)."
        )
    if form.has_experts and topk == 1 and model.moe_router_score_function == "sigmoid":
        raise ConversionError(
            "num_experts_per_tok = 1: Megatron-Core weights a single expert by its sigmoid score, and "
            f"{form.architecture} by 1. They agree from 2 experts per token on (moe_router_topk)."
        )


def _linear_layers(config: dict[str, Any]) -> int | list[int]:
    if config["layer_types"] is None:
        return int(config["full_attention_interval"])
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
    if name in ("mtp_variant", "mtp_hidden_source", *OUR_MTP_KEYS.values()) and not model.mtp_num_layers:
        return None
    switch = next((on for prefixes, on in _SWITCHES if name.startswith(prefixes)), None)
    return None if switch is not None and not switch(model) else getattr(model, name)


_SWITCHES = (
    (("kv_channels", "num_query_groups"), lambda model: not model.multi_latent_attention),
    # Multi-latent attention reads it too, except with YaRN.
    (("rotary_percent",), lambda model: not model.multi_latent_attention or model.rope_type == "rope"),
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
