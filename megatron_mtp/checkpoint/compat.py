"""What may change between the run that saved a checkpoint and the run that resumes it, field by field.

Each field states whether it is free, changes the curve, or is fixed (`resume` in config/knob.py). An unknown section is
fixed. Imports neither torch nor megatron.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from megatron_mtp.checkpoint.depth_change import DepthChange
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.knob import Resume, phase_rule, resume_rule
from megatron_mtp.config.sections import section_types

# What to do instead, where there is something better than going back.
_ADVICE = {
    ("rng", "seed"): "The data order depends on it.",
    ("ddp", "use_distributed_optimizer"): "The two optimizers keep their master weights under different names.",
}

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class ConfigDifferences:
    """Result of `compare`: why resuming is refused, and which changes move the curve; one sentence each."""

    refusals: list[str]
    changes: list[str]


def compare(
    saved: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any], *, phase_begins: bool = False
) -> ConfigDifferences:
    """Compares two resolved configs as nested dicts. Phases are not compared: each of their configs stands alone.

    Args:
        saved: of the checkpoint.
        present: of the run that wants to resume; where model.vocab_size is None it is not known yet and not compared.
        defaults: of this version; a field that one side lacks is taken at its default.
        phase_begins: `present` is of a phase that begins with the resume: what a phase may set may change.
    """
    refusals, changes = [], []
    depths = _depth_change(saved, present)
    for section in sorted((set(saved) | set(present)) - {"phases"}):
        ours, theirs = present.get(section) or {}, saved.get(section) or {}
        for name in sorted(set(ours) | set(theirs)):
            default = (defaults.get(section) or {}).get(name, _ABSENT)
            old, new = theirs.get(name, default), ours.get(name, default)
            if same(section, name, old, new) or (section == "model" and depths.leaves_open(name)):
                continue
            text = f"{section}.{name} = {_show(new)}: the checkpoint was saved with {_show(old)}"
            rule = _rule(section, name)
            if rule == "curve" or (phase_begins and _may_set(section, name)):
                changes.append(f"{text}.")
            elif rule == "fixed":
                refusals.append(f"{text}. {_advice(section, name)}")
    refusals += depths.refusals() + _pair_refusals(saved, present)
    return ConfigDifferences(refusals, changes)


def _depth_change(saved: dict[str, Any], present: dict[str, Any]) -> DepthChange:
    return DepthChange.between(saved.get("model") or {}, present.get("model") or {})


# Fixed fields that may still differ when only the weights are loaded.
_MAY_DIFFER = frozenset({"seq_length"})


def compare_weights(
    saved: dict[str, Any],
    present: dict[str, Any],
    defaults: dict[str, Any],
    *,
    layers_may_change: bool = False,
    phase_begins: bool = False,
) -> list[str]:
    """Why weights of one config do not fit the model of another, one sentence each.

    Args:
        saved, present, defaults: as `compare`.
        layers_may_change: MTP layers may be added by model.mtp_new_layers_init, or dropped.
        phase_begins: as `compare`.
    """
    ours, theirs, default = present["model"], saved.get("model") or {}, defaults["model"]
    depths = _depth_change(saved, present)
    refusals = depths.refusals() if layers_may_change else []
    if not layers_may_change and depths.old != depths.new:
        new, old = depths.new, depths.old
        refusals.append(f"model.mtp_num_layers: the weights hold {old} MTP layers, and the model has {new}.")
    for name in sorted(set(ours) | set(theirs)):
        old, new = theirs.get(name, default.get(name, _ABSENT)), ours.get(name, default.get(name, _ABSENT))
        may_change = _rule("model", name) != "fixed" or name in _MAY_DIFFER or depths.leaves_open(name)
        may_change |= phase_begins and _may_set("model", name)
        if not may_change and not same("model", name, old, new):
            refusals.append(f"model.{name} = {_show(new)}: the weights are of a model with {_show(old)}.")
    return refusals


def same(section: str, name: str, old: Any, new: Any) -> bool:
    """Whether two values of a field mean the same run. Data may lie in another folder; only its names count."""
    if section == "model" and name == "vocab_size" and new is None:
        return True
    if section == "dataset" and name in ("blend", "blend_per_split"):
        old, new = _base_names(old), _base_names(new)
    return old == new


def _base_names(blend: Any) -> Any:
    if isinstance(blend, str):
        return os.path.basename(blend)
    if isinstance(blend, list | tuple):
        return [_base_names(part) for part in blend]
    return blend


def _pair_refusals(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Changes that are fine alone and not together."""
    return _dtype_refusals(saved, present) + _frozen_refusals(saved, present)


def _frozen_refusals(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    old, new = (bool((side.get("model") or {}).get("mtp_freeze_trunk")) for side in (saved, present))
    if old == new or not (present.get("checkpoint") or {}).get("load_optim", True):
        return []
    return [
        f"model.mtp_freeze_trunk = {new}: the checkpoint was saved with {old}. It can change with "
        "checkpoint.load_optim=false only, since a frozen trunk has no optimizer state."
    ]


def _dtype_refusals(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    old, new = ((side.get("precision") or {}).get("dtype") for side in (saved, present))
    sharded = (present.get("ddp") or {}).get("use_distributed_optimizer", True)
    if old == new or sharded:
        return []
    return [
        f"precision.dtype = {_show(new)}: the checkpoint was saved with {_show(old)}. It can change with "
        "ddp.use_distributed_optimizer=true only, which keeps fp32 master weights for every dtype."
    ]


def _rule(section: str, name: str) -> Resume:
    kind = section_types().get(section)
    return "fixed" if kind is None else resume_rule(kind, name)


def _advice(section: str, name: str) -> str:
    if _may_set(section, name):
        return f"A phase may change it: phases.NAME.{section}.{name} and checkpoint.enter_phase=NAME (docs/phases.md)."
    return _ADVICE.get((section, name), "It cannot change within a run.")


def _may_set(section: str, name: str) -> bool:
    """Whether a phase may set the field."""
    kind = section_types().get(section)
    return kind is not None and name in field_types(kind) and phase_rule(kind, name) != "fixed"


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
