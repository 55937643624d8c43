"""Rotary positions in config.json: `rope_parameters` of transformers 5, and rope_theta with rope_scaling of 4."""

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
REQUIRED = {"llama3": ("factor", *LLAMA3), "yarn": ("factor", "original_max_position_embeddings"), "default": ()}
"""Keys without which the scaling is not determined; transformers refuses most such files and guesses in others."""
PERCENT = "partial_rotary_factor"


def rope_to_hf(model: ModelConfig, form: Family) -> dict[str, Any]:
    """Rotary positions and `max_position_embeddings`, in the keys of both transformers 5 and 4."""
    scaling: dict[str, Any] = {}
    longest = model.seq_length
    if model.multi_latent_attention and model.rope_type == "yarn":
        scaling = {"rope_type": "yarn"} | {key: getattr(model, ours) for key, ours in YARN.items()}
        longest = max(longest, round(model.original_max_position_embeddings * model.rotary_scaling_factor))
        if not model.mscale_all_dim:
            # transformers uses both or neither; Megatron-Core uses mscale alone if mscale_all_dim is 0.
            del scaling["mscale"], scaling["mscale_all_dim"]
    elif model.rope_scaling:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor} | LLAMA3
        # Llama 3.1 has twice 8192 x 8 positions.
        longest = max(longest, round(2 * LLAMA3["original_max_position_embeddings"] * model.rope_scaling_factor))
    of_all: dict[str, Any] = {"rope_theta": model.rotary_base}
    if form.rotary_percent is not None:
        of_all[PERCENT] = model.rotary_percent
    config = {
        "rope_parameters": {"rope_type": "default"} | of_all | scaling,
        "max_position_embeddings": longest,
    } | of_all
    return config | ({"rope_scaling": scaling} if scaling else {})


def rope_from_hf(config: dict[str, Any], model: ModelConfig, form: Family) -> None:
    """Sets the rotary fields of `model`.

    Raises:
        ConversionError: a kind of scaling, or a number in it, that is not supported; two descriptions that differ.
    """
    rope = _joined(config)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta", None)
    if theta is None:
        raise ConversionError(
            f"config.json of {config['model_type']}: has no rope_theta, nor rope_parameters with one."
        )
    model.rotary_base = float(theta)
    model.rotary_percent = _percent(rope.pop(PERCENT, form.rotary_percent), form)
    supported = ("default", "yarn" if model.multi_latent_attention else "llama3")
    if kind not in supported:
        raise ConversionError(
            f"rope_parameters: rope_type {kind!r} is not supported for {config['model_type']}; "
            f"{' and '.join(map(repr, supported))} are."
        )
    if missing := [key for key in REQUIRED[kind] if key not in rope]:
        raise ConversionError(f"rope_parameters of {kind}: has no {', '.join(missing)}.")
    if kind == "llama3":
        model.rope_scaling = True
        model.rope_scaling_factor = float(rope.pop("factor"))
        rope = {key: value for key, value in rope.items() if LLAMA3.get(key) != value}
    elif kind == "yarn":
        model.rope_type = "yarn"
        _set_yarn(rope, model)
        rope = {key: value for key, value in rope.items() if key not in YARN}
    if rope:
        shown = ", ".join(f"{key} = {value!r}" for key, value in rope.items())
        only = f"; only {LLAMA3} is supported" if kind == "llama3" else ""
        raise ConversionError(f"rope_parameters of {kind}: {shown} is not supported{only}.")


def _set_yarn(rope: dict[str, Any], model: ModelConfig) -> None:
    """transformers takes the two scales from mscale and mscale_all_dim if both are above 0, and 1 and 0 otherwise."""
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if any(scales) != all(scales):
        raise ConversionError(
            f"rope_parameters of yarn: mscale = {scales[0]} with mscale_all_dim = {scales[1]}: readers differ in what "
            "one without the other means. Give both, or neither."
        )
    for key, ours in YARN.items():
        if key in rope and (all(scales) or not key.startswith("mscale")):
            setattr(model, ours, type(getattr(model, ours))(rope[key]))


def _percent(value: Any, form: Family) -> float:
    if form.rotary_percent is None and value in (None, 1.0):
        return 1.0
    if form.rotary_percent is None or value is None:
        rule = "ignores it and rotates the whole head" if value is not None else "takes null for 1, not for its default"
        raise ConversionError(f"{PERCENT} = {value}: {form.architecture} of transformers {rule}. Remove the key.")
    return float(value)


def _joined(config: dict[str, Any]) -> dict[str, Any]:
    """One dictionary from the new or the old form, without keys that are null.

    Raises:
        ConversionError: both are there and differ; transformers 4 and 5 take different ones then.
    """
    of_all = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    of_all |= {PERCENT: config[PERCENT]} if PERCENT in config else {}
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(config.get(name) or {})
        kinds = {rope.pop(key) for key in ("rope_type", "type") if rope.get(key) is not None}
        rope = {key: value for key, value in rope.items() if value is not None}
        differing = [key for key in of_all if rope.get(key, of_all[key]) != of_all[key]]
        if len(kinds) > 1 or differing:
            what = f"{differing[0]} = {rope[differing[0]]} beside {of_all[differing[0]]}" if differing else str(kinds)
            raise ConversionError(f"{name} of config.json: {what} are two descriptions that differ. Remove one.")
        if config.get(name):
            found.append(of_all | rope | {"rope_type": kinds.pop() if kinds else "default"})
    if len(found) == 2 and found[0] != found[1]:
        raise ConversionError(
            f"rope_scaling = {config['rope_scaling']} beside rope_parameters = {config['rope_parameters']}: two "
            "descriptions of the positions that differ. Remove one."
        )
    return found[0] if found else of_all | {"rope_type": "default"}
