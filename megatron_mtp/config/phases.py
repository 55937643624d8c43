"""Phases of a run as they are written: where each begins, and which fields it sets.

    phases:
      long:
        start_tokens: 14.8T
        model: {seq_length: 32768}
        train: {global_batch_size: 1920, rampup_batch_size: null}

`phase_configs` applies them to a config; `timeline` says where they begin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config.base import Section, unknown_field
from megatron_mtp.config.coerce import MisfitError, check, coerce, field_types
from megatron_mtp.config.knob import MAX_STEPS, MAX_TOKENS, PhaseRule, phase_rule, resume_rule
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.config.sections import RunConfig, section_types
from megatron_mtp.errors import ConfigError, Problem, nearest

BASE = "base"
"""Name of the part of a run before its first phase."""
STARTS = {"start_iters": MAX_STEPS, "start_samples": MAX_STEPS, "start_tokens": MAX_TOKENS}
"""Key of a place where a phase begins -> its maximum. All are counted since the start of the run."""
DOCS = "docs/phases.md lists what a phase may change."


@dataclass(frozen=True, slots=True)
class PhaseStart:
    """Where a phase begins: after the first step that ends at or after this place.

    Args:
        key: of `STARTS`.
        count: steps, samples or tokens since the start of the run.
    """

    key: str
    count: int

    def is_reached(self, iteration: int, samples: int, tokens: int) -> bool:
        """Whether a run that has done this much is there."""
        return {"start_iters": iteration, "start_samples": samples, "start_tokens": tokens}[self.key] >= self.count

    def __str__(self) -> str:
        return f"{self.key} = {self.count:,}"


@dataclass(frozen=True, slots=True)
class Overlay:
    """One phase as it is written, checked.

    Args:
        changes: section -> field -> value, as a config file gives them.
    """

    name: str
    start: PhaseStart
    changes: Mapping[str, Mapping[str, Any]]

    @property
    def fields(self) -> list[str]:
        """The fields that it sets, as "section.field"."""
        return [f"{section}.{name}" for section, values in self.changes.items() for name in values]

    def begins(self, rule: PhaseRule) -> bool:
        """Whether it sets a field of this rule, and so begins a schedule, a batch ramp or a data order of its own."""
        return any(
            phase_rule(section_types()[section], name) == rule
            for section, values in self.changes.items()
            for name in values
        )


def read_phases(cfg: RunConfig) -> tuple[list[Overlay], list[Problem]]:
    """The phases of a config in their order, and what is wrong with their form. Values are checked by `finalize`."""
    given: Any = cfg.phases
    if not isinstance(given, dict):
        return [], [Problem(fields=("phases",), value=given, rule="must be a mapping of names to phases")]
    overlays, problems = [], []
    for name, data in given.items():
        overlay, found = _read(name, data)
        overlays += [overlay] if overlay is not None and not found else []
        problems += found
    chosen = cfg.checkpoint.enter_phase
    if chosen is not None and chosen not in given:
        rule = f"there is no such phase.{nearest(str(chosen), map(str, given))}"
        known = f"Phases: {', '.join(map(str, given))}." if given else "The config has no phases."
        problems.append(Problem(fields=("checkpoint.enter_phase",), value=chosen, rule=rule, remedy=known))
    return overlays, problems


def _read(name: Any, data: Any) -> tuple[Overlay | None, list[Problem]]:
    field = f"phases.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == BASE:
        rule = f"a name consists of letters, digits, '_' and '-', and is not {BASE!r}, the part before the first phase"
        return None, [Problem(fields=(field,), rule=rule, remedy="Choose another name.")]
    if not isinstance(data, dict):
        rule = "must be a mapping: where it begins (start_tokens, ...) and the sections that it changes"
        return None, [Problem(fields=(field,), value=data, rule=rule)]
    start, problems = _read_start(field, data)
    changes: dict[str, dict[str, Any]] = {}
    for section, values in data.items():
        if section in STARTS:
            continue
        kind = section_types().get(section)
        if kind is None:
            known = [*STARTS, *section_types()]
            rule = f"there is no such section.{nearest(str(section), known)}"
            remedy = f"Known: {', '.join(known)}."
            problems.append(Problem(fields=(f"{field}.{section}",), rule=rule, remedy=remedy))
        elif not isinstance(values, dict):
            problems.append(
                Problem(fields=(f"{field}.{section}",), value=values, rule="must be a mapping of its fields")
            )
        else:
            changes[section] = values
            for one, value in values.items():
                problems += _field_problems(field, kind, one, value)
    return (None if start is None else Overlay(name, start, changes)), problems


def _read_start(field: str, data: Mapping[str, Any]) -> tuple[PhaseStart | None, list[Problem]]:
    given = {key: data[key] for key in STARTS if data.get(key) is not None}
    if len(given) != 1:
        rule = f"must say once where it begins, with one of {', '.join(STARTS)}"
        listed = f" ({' and '.join(f'{key} = {value!r}' for key, value in given.items())} are given)" if given else ""
        return None, [Problem(fields=(field,), rule=rule + listed)]
    ((key, value),) = given.items()
    try:
        count = parse_quantity(value) if isinstance(value, str) else coerce(value, int)
    except (ConfigError, MisfitError):
        rule = 'must be a whole number, or one with a suffix such as "10B"'
        return None, [Problem(fields=(f"{field}.{key}",), value=value, rule=rule)]
    if not 1 <= count <= STARTS[key]:
        rule = f"must be at least 1 and at most {STARTS[key]:_}; what holds from the start on is set without a phase"
        return None, [Problem(fields=(f"{field}.{key}",), value=value, rule=rule)]
    return PhaseStart(key, count), []


def _field_problems(phase: str, kind: type[Section], name: Any, value: Any) -> list[Problem]:
    """What is wrong with a field in a phase, whatever its value."""
    field = f"{kind.SECTION}.{name}"
    if name not in field_types(kind):
        return [Problem(fields=(phase,), rule=unknown_field(kind.SECTION, str(name), list(field_types(kind))))]
    if phase_rule(kind, name) != "fixed":
        return []
    if resume_rule(kind, name) == "fixed":
        rule = "cannot change within a run"
        remedy = "A new run with checkpoint.pretrained_checkpoint keeps the weights."
    else:
        rule = "is set once for the whole run, and not in a phase"
        remedy = f"Set {field} outside the phases; a resume may change it."
    return [Problem(fields=(f"{phase}.{field}", field), value=value, rule=rule, remedy=f"{remedy} {DOCS}")]


def merged_phases(phases: Mapping[str, Any], data: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Phases with changes from a file or an argument, which are not changed themselves.

    A phase is merged field by field, and a new start takes the place of the old one; null removes a phase, and in place
    of all phases every one.
    """
    if data is None:
        return {}, []
    if not isinstance(data, dict):
        return dict(phases), [Problem(fields=("phases",), value=data, rule="must be a mapping of names to phases")]
    merged = dict(phases)
    for name, changes in data.items():
        old = merged.get(name)
        if changes is None:
            merged.pop(name, None)
        elif not isinstance(changes, dict) or not isinstance(old, dict):
            merged[name] = changes
        else:
            has_start = any(changes.get(key) is not None for key in STARTS)
            kept = {key: value for key, value in old.items() if not (has_start and key in STARTS)}
            for key, value in changes.items():
                both = isinstance(value, dict) and isinstance(kept.get(key), dict)
                kept[key] = {**kept[key], **value} if both else value
            merged[name] = kept
    return merged, []


def phase_data(keys: list[str], value: Any, raw: str) -> Any:
    """The mapping that `phases.KEY.KEY...=value` stands for, for `merged_phases`.

    Args:
        keys: below `phases`.
        raw: text of the value, which is taken where only text would fit.
    """
    if len(keys) > 3 and keys[1] in section_types():
        keys = [*keys[:3], ".".join(keys[3:])]
    if len(keys) == 3 and (kind := section_types().get(keys[1])) and keys[2] in field_types(kind):
        value = _fitting(value, raw, field_types(kind)[keys[2]])
    for key in reversed(keys):
        value = {key: value}
    return value


def _fitting(value: Any, raw: str, wanted: Any) -> Any:
    for fit, candidate in ((check, value), (check, raw), (coerce, value)):
        try:
            return fit(candidate, wanted)
        except MisfitError:
            continue
    return value  # `finalize` says what is wrong with it
