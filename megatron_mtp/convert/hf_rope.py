"""Rotary positions in config.json: `rope_parameters` of transformers 5, and the older rope_theta with rope_scaling."""

from __future__ import annotations

from typing import Any

from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_families import Family
from megatron_mtp.errors import ConversionError

# Megatron-Core has Llama 3.1's scaling with these numbers only; the factor is free.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Key of rope_parameters -> our field, for multi-latent attention.
YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def rope_to_hf(model: ModelConfig, form: Family) -> dict[str, Any]:
    """`rope_parameters` and `max_position_embeddings`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    longest = model.seq_length
    if model.multi_latent_attention and model.rope_type == "yarn":
        rope |= {"rope_type": "yarn"} | {key: getattr(model, ours) for key, ours in YARN.items()}
        longest = max(longest, round(model.original_max_position_embeddings * model.rotary_scaling_factor))
        if not model.mscale_all_dim:
            # transformers uses both or neither; Megatron-Core uses mscale alone if mscale_all_dim is 0.
            del rope["mscale"], rope["mscale_all_dim"]
    elif model.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor} | LLAMA3
        # Llama 3.1 has twice 8192 x 8 positions.
        longest = max(longest, round(2 * LLAMA3["original_max_position_embeddings"] * model.rope_scaling_factor))
    if not model.multi_latent_attention and (model.rotary_percent, form.rotary_percent) != (1.0, 1.0):
        rope["partial_rotary_factor"] = model.rotary_percent
    return {"rope_parameters": rope, "max_position_embeddings": longest}


def rope_from_hf(config: dict[str, Any], model: ModelConfig, form: Family) -> None:
    """Sets the rotary fields of `model`.

    Raises:
        ConversionError: a kind of scaling, or a number in it, that is not supported.
    """
    rope = _joined(config)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None)
    if theta is None:
        raise ConversionError(
            f"config.json of {config['model_type']}: has no rope_theta, nor rope_parameters with one."
        )
    model.rotary_base = float(theta)
    percent = rope.pop("partial_rotary_factor", None) or form.rotary_percent
    if not model.multi_latent_attention:
        model.rotary_percent = float(percent)
    if kind == "llama3" and not model.multi_latent_attention:
        model.rope_scaling = True
        model.rope_scaling_factor = float(rope.pop("factor"))
        rope = {key: value for key, value in rope.items() if LLAMA3.get(key) != value}
    elif kind == "yarn" and model.multi_latent_attention:
        model.rope_type = "yarn"
        for key, ours in YARN.items():
            if rope.get(key) is not None:
                setattr(model, ours, type(getattr(model, ours))(rope[key]))
        rope = {key: value for key, value in rope.items() if key not in YARN}
    elif kind != "default":
        raise ConversionError(
            f"rope_parameters: rope_type {kind!r} is not supported for {config['model_type']}; 'default' and "
            f"{'yarn' if model.multi_latent_attention else 'llama3'!r} are."
        )
    if unknown := {key: value for key, value in rope.items() if value is not None and kind != "default"}:
        raise ConversionError(f"rope_parameters of {kind}: {unknown} is not supported; llama3 has {LLAMA3}.")


def _joined(config: dict[str, Any]) -> dict[str, Any]:
    """One dictionary from the new or the old form."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is None and config.get(key) is not None:
            rope[key] = config[key]
    return rope
