"""Varied configs of each family, and whether transformers and the training model compute the same with them.

Nothing is listed by hand that can be asked: the keys are those of transformers' config class and the fields those of
ModelConfig, and the values follow from their types and defaults.
"""

from __future__ import annotations

import copy
import json
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.knob import range_of
from megatron_mtp.config.mcore_table import MCORE_FIELDS
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_config import hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import find_family
from megatron_mtp.errors import MegatronMTPError, UnsupportedError
from megatron_mtp.recipes.common import pretrain_common
from tests.convert.hf_models import COMMON, MODELS, logits_of, randomize, tokens

CLASSES = {"mimo": "qwen2"}  # MiMo has no class in transformers; its trunk is Qwen2's
ABSENT = "(absent)"
OF_TEXT = frozenset(
    """_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label is_encoder_decoder
    label2id model_type output_attentions output_hidden_states pad_token_id problem_type return_dict
    transformers_version use_cache""".split()
)
"""Keys about text, labels, training and what a call returns; none changes logits of a call without a cache."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _without(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The dictionary without one of its keys, and with one of them null."""
    return [{k: v for k, v in values.items() if k != key} for key in values] + [
        values | {key: None} for key in values if key != "rope_type"
    ]


ROPES: list[Any] = [
    YARN,
    LLAMA3,
    *_without(YARN),
    *_without(LLAMA3),
    *(YARN | {"mscale": a, "mscale_all_dim": b} for a in (0, 0.7, None) for b in (0, 0.7, 1.3)),
    *(YARN | extra for extra in ({"beta_fast": 8}, {"beta_slow": 2}, {"attention_factor": 1.5}, {"truncate": False})),
    *(LLAMA3 | {"low_freq_factor": 2.0}, LLAMA3 | {"factor": 2.0}),
    {"rope_type": "default", "rope_theta": 5e5},
    {"type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
]
# Keys that no class declares for all families, but some read, or other loaders and older files have.
MORE_KEYS: dict[str, list[Any]] = {
    "attention_bias": [True],
    "attention_chunk_size": [4],
    "full_attention_interval": [2, None],
    "head_dim": [4, 16, None],
    "is_causal": [False, None],
    "mlp_bias": [True],
    "norm_topk_prob": [True, False],
    "num_experts": [8],
    "num_local_experts": [8],
    "num_mtp_layers": [0],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5, 1.0, None],
    "rope_interleave": [False],
    "rope_parameters": [None, *ROPES],
    "rope_scaling": [YARN, LLAMA3, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}],
    "rope_theta": [5e5],
    "scoring_func": ["softmax", "sigmoid"],
    "sliding_window": [4],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
    "use_sliding_window": [True],
}
LISTS: dict[str, list[Any]] = {
    "layer_types": [
        ["full_attention", "full_attention"],
        ["full_attention", "linear_attention"],
        ["sliding_attention", "full_attention"],
        ["full_attention"],
    ],
    "mlp_only_layers": [[], [0], [1], [0, 1], [5]],
}


@dataclass
class Case:
    """One varied config.

    Args:
        label: what was varied.
        named: words of which a refusal must hold one.
        config: config.json; None: what the export of `model` writes.
        model: fields of ModelConfig to change in the base; None: those of `config`.
    """

    family: str
    label: str
    named: tuple[str, ...]
    config: dict[str, Any] | None = None
    model: dict[str, Any] | None = None


@dataclass
class Outcome:
    """`kind`: equal, refused, unnamed (refused without the name), invalid (no such model), unrun (transformers refuses)
    or different."""

    case: Case
    kind: str
    detail: str = ""


def base_config(family: str) -> dict[str, Any]:
    """config.json of a tiny model with two layers, with every key of the class."""
    from transformers import AutoConfig

    own = COMMON | MODELS[family][1] | {"num_hidden_layers": 2}
    if family == "qwen3_next":
        own["layer_types"] = ["linear_attention", "full_attention"]
    if family == "mimo":
        own["num_nextn_predict_layers"] = 0
    config = AutoConfig.for_model(CLASSES.get(family, family), **own)
    values = json.loads(config.to_json_string(use_diff=False))
    return values | {"model_type": family, "architectures": [find_family(family).architecture]}


def import_cases(family: str) -> list[Case]:
    """Every key of the class, and `MORE_KEYS`, with other values."""
    base = base_config(family)
    keys = {key: _values(key, value) for key, value in base.items() if key not in OF_TEXT}
    for key, values in MORE_KEYS.items():
        keys[key] = [*keys.get(key, []), *values]
    found: dict[str, Case] = {}
    for key, values in keys.items():
        for value in values:
            changed = {k: v for k, v in base.items() if k != key} | ({} if value is ABSENT else {key: value})
            if changed != base:
                label = f"{key}={json.dumps(value)}"
                found[label] = Case(family, label, _names_of(family, key), changed)
    return list(found.values())


def pairs(singles: list[Case], number: int) -> list[Case]:
    """Random pairs of import cases of one family that were accepted alone."""
    drawn, found = random.Random(3), []
    base = base_config(singles[0].family)
    for _ in range(number):
        one, two = drawn.sample(singles, 2)
        changed = dict(base)
        for case in (one, two):
            assert case.config is not None
            changed |= {key: value for key, value in case.config.items() if base.get(key, ABSENT) != value}
        found.append(Case(one.family, f"{one.label} {two.label}", one.named + two.named, changed))
    return found


def export_cases(family: str) -> list[Case]:
    """Every field of ModelConfig with other values, those of model.mcore included."""
    base, hints, found = base_model(family).model, get_type_hints(ModelConfig, include_extras=True), []
    for field in fields(ModelConfig):
        for value in _field_values(field.name, hints[field.name], getattr(base, field.name)):
            if value != getattr(base, field.name):
                label = f"{field.name}={value}"
                named = (field.name, *(("moe_shared",) if field.name == "moe_ffn_hidden_size" else ()))
                found.append(Case(family, label, named, model={field.name: value}))
    for name, (kind, default) in MCORE_FIELDS.items():
        for value in _of_type(kind, default):
            if value != default and value is not None:
                found.append(Case(family, f"mcore.{name}={value}", (name,), model={"mcore": {name: value}}))
    return found


def base_model(family: str) -> ConfigContainer:
    """The config that `base_config` means, for one rank, not finalized."""
    cfg = pretrain_common()
    cfg.model = model_config_from_hf(base_config(family))
    cfg.model.mtp_num_layers = 0
    cfg.precision.dtype = "fp32"
    cfg.train.global_batch_size, cfg.train.micro_batch_size = 8, 1
    cfg.dist.device, cfg.dist.num_threads = "cpu", 1
    return cfg


def _values(key: str, value: Any) -> list[Any]:
    """Other values of a key of config.json."""
    found: list[Any] = [ABSENT, None]
    if key in LISTS:
        return found + LISTS[key]
    if isinstance(value, bool):
        return [*found, not value]
    if isinstance(value, int):
        return [*found, 0, 1, value + 1, 2 * value]
    if isinstance(value, float):
        return [*found, 0.0, value * 2, value / 2]
    if isinstance(value, str):
        return [*found, {"silu": "gelu"}.get(value, "other")]
    return found


def _field_values(name: str, kind: Any, value: Any) -> list[Any]:
    """Other values of a field of ModelConfig."""
    if name in ("moe_layer_freq", "linear_attention_freq"):
        return [1, 2, [0, 1], [1, 0], [0, 0], [1, 1]]
    if name == "recompute_modules":
        return [["core_attn"]]
    limits = range_of(ModelConfig, name)
    lowest = [] if limits is None else [type(value)(limits.lowest) if value is not None else limits.lowest]
    return [*_of_type(kind, value), *lowest]


def _of_type(kind: Any, value: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) in (types.UnionType,) or "Union" in str(get_origin(kind)):
        return [item for part in get_args(kind) for item in _of_type(part, value)]
    if kind is type(None):
        return [None]
    if kind is bool:
        return [False, True]
    if kind in (int, float):
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 1
        return [kind(2 * number), kind(number + 1), kind(number / 2)]
    if kind is str:
        return ["other"]
    return [[2]] if get_origin(kind) is list and get_args(kind) == (int,) else []


# Key -> the field that a refusal may name in its place.
FIELDS = {
    "hidden_size": "kv_channels",
    "layer_types": "linear_attention_freq",
    "n_group": "moe_router_num_groups",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
}


def _names_of(family: str, key: str) -> tuple[str, ...]:
    form = find_family(family)
    first = form.renames.get(key, key)
    inner = ("partial_rotary_factor",) if key == "rope_parameters" else ()
    return (key, first, form.keys.get(first, key), FIELDS.get(key, key), *inner)


def outcomes(cases: list[Case], folder: str, keep: bool = False) -> list[Outcome]:
    """The work of one rank of a pool. With `keep`, `folder` holds each exported model with transformers' logits."""
    found = []
    for number, case in enumerate(cases):
        found.append(_outcome(case, Path(folder) / f"{case.family}-{case.label[:60].replace('/', '_')}-{number}", keep))
    return found


def _outcome(case: Case, folder: Path, keep: bool) -> Outcome:
    try:
        cfg = base_model(case.family)
        if case.config is not None:
            cfg.model = model_config_from_hf(case.config)
            cfg.model.mtp_num_layers = 0
        cfg.model.update(**(case.model or {}))
        cfg = _finalized(cfg, case)
        config = case.config
        exported = hf_config_dict(cfg.model, case.family)
        config = exported if config is None else config
    except _InvalidError as error:
        return Outcome(case, "invalid", str(error))
    except MegatronMTPError as error:
        return Outcome(case, "refused" if any(name in str(error) for name in case.named) else "unnamed", str(error))
    try:
        model = _theirs(case.family, config)
        ids = tokens(vocab=min(model.config.vocab_size, 100))
        expected = logits_of(model, ids)
    except Exception as error:  # whatever its classes raise for a config that they do not run
        return Outcome(case, "unrun", f"{type(error).__name__}: {error}")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        got = _ours(cfg, folder, ids)
    except UnsupportedError as error:  # this backend cannot build it
        return Outcome(case, "refused" if case.model is None else "invalid", str(error))
    except Exception as error:
        return Outcome(case, "different", f"{type(error).__name__}: {error}")
    error = float((got - expected).abs().max() / expected.abs().max())
    if keep:
        torch.save((ids, expected), folder / "logits.pt")
    else:
        for file in folder.iterdir():
            file.unlink()
    limit = 1e-4 if case.family == "qwen3_next" else 1e-5
    return Outcome(case, "equal" if error <= limit else "different", f"{error:.2g}")


class _InvalidError(Exception):
    """The model does not exist on our side: no export is tried."""


def _finalized(cfg: ConfigContainer, case: Case) -> ConfigContainer:
    try:
        return cfg.finalize(1)
    except MegatronMTPError as error:
        if case.config is None:
            raise _InvalidError(str(error)) from error
        raise


def _theirs(family: str, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CLASSES.get(family, family), **values)).eval()
    randomize(model)
    return model


def _ours(cfg: ConfigContainer, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from megatron_mtp.convert.load import load_weights
    from megatron_mtp.model.build import build_model
    from tests.convert.ours import forward
    from tests.harness.runs import joined

    with joined(cfg) as (resolved, groups):
        chunks = build_model(resolved, groups, torch.device("cpu"))
        load_weights(chunks, str(folder), cfg, groups, mtp_init="fresh")
        found = forward(cfg, chunks[0], groups, ids)
    assert found is not None
    return found[0]


def counts(found: list[Outcome]) -> Iterator[str]:
    """Lines of a table: family, kind, number."""
    for family in sorted({outcome.case.family for outcome in found}):
        kinds = [outcome.kind for outcome in found if outcome.case.family == family]
        yield f"{family}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
