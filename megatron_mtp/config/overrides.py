"""Changes from YAML files and from `section.field=value` arguments: files win over the recipe, arguments over files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mtp.config.base import Section
from megatron_mtp.config.coerce import MisfitError, check, field_types
from megatron_mtp.config.phases import merged_phases, phase_data
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.config.serialize import fitted, merge, read_text, section_of
from megatron_mtp.errors import ConfigError, Problem, shown


def apply_yaml(cfg: RunConfig, path: str | Path) -> None:
    """Overwrites what the YAML file names.

    Raises:
        ConfigError: the file cannot be read, or every unknown name and misfit in it.
    """
    from megatron_mtp.config.yaml_text import load_yaml

    data = load_yaml(read_text(path), str(path))
    try:
        merge(cfg, {} if data is None else data, origin=str(path))
    except ConfigError as error:
        raise error.within(str(path)) from None


def apply_overrides(cfg: RunConfig, arguments: list[str]) -> None:
    """Applies `model.num_layers=8` and the like; values are YAML, `None` and `null` both mean no value.

    A name below a mapping sets one of its entries: `model.mcore.attention_softmax_in_fp32=true`. A phase is a mapping
    too: `phases.long.start_tokens=10B phases.long.model.seq_length=32768`; null removes one, or all of them.

    Raises:
        ConfigError: every problem in all arguments.
    """
    problems: list[Problem] = []
    for argument in arguments:
        try:
            if argument.split("=")[0].split(".")[0].strip() == "phases":
                _set_phases(cfg, argument)
                continue
            section, name, value = _parse(cfg, argument)
            setattr(section, name, value)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def as_override(field: str, value: Any) -> str:
    """The argument of `apply_overrides` that sets "section.field" to plain data."""
    return f"{field}={json.dumps(value)}"  # JSON is YAML


def _parse(cfg: RunConfig, argument: str) -> tuple[Section, str, Any]:
    from megatron_mtp.config.yaml_text import load_yaml

    path, equals, raw = argument.partition("=")
    keys = path.strip().split(".")
    if not equals:
        example = "such as model.num_layers=8"
        raise ConfigError(f"{shown(argument)}: an override is written as section.field=value, {example}.")
    section = section_of(cfg, keys[0])
    if len(keys) == 1:
        example = f"as in {keys[0]}.field=value"
        raise ConfigError(f"{shown(argument)}: {keys[0]} is a section; name one of its fields, {example}.")
    value = load_yaml(raw, argument)
    if len(keys) > 2:
        if keys[1] in field_types(type(section)) and not _holds_names(field_types(type(section))[keys[1]]):
            raise ConfigError(f"{shown(argument)}: {keys[0]}.{keys[1]} holds no names.")
        return section, keys[1], fitted(section, keys[1], {".".join(keys[2:]): value})
    return section, keys[1], fitted(section, keys[1], value, raw)


def _set_phases(cfg: RunConfig, argument: str) -> None:
    from megatron_mtp.config.yaml_text import load_yaml

    path, equals, raw = argument.partition("=")
    keys = path.strip().split(".")
    if not equals:
        example = "phases.long.start_tokens=10B or phases.long.model.seq_length=32768"
        raise ConfigError(f"{shown(argument)}: an override of a phase is written as {example}.")
    data = phase_data(keys[1:], None if raw == "None" else load_yaml(raw, argument), raw)
    cfg.phases, problems = merged_phases(cfg.phases, data)
    if problems:
        raise ConfigError(problems)


def _holds_names(wanted: Any) -> bool:
    try:
        check({}, wanted)
    except MisfitError:
        return False
    return True
