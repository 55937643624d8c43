"""Config to plain data and YAML and back. Nothing in the data can name code to run."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_mtp.config.base import REMOVED, RENAMED, Section, unknown_field
from megatron_mtp.config.coerce import MisfitError, check, coerce, field_types
from megatron_mtp.config.phases import merged_phases
from megatron_mtp.config.sections import RunConfig, section_types
from megatron_mtp.errors import ConfigError, Problem, cut, nearest


def to_dict(cfg: Section) -> dict[str, Any]:
    """Plain data: dicts, lists, numbers, text."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}  # type: ignore[arg-type]
    return {name: to_dict(v) if isinstance(v, Section) else deepcopy(v) for name, v in values.items()}


def to_yaml(cfg: RunConfig, path: str | Path | None = None) -> str:
    """All sections as YAML; also written to `path` if it is given."""
    from megatron_mtp.config.yaml_text import dump_yaml  # PyYAML takes a while to import

    text = dump_yaml(to_dict(cfg))
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def read_yaml(text_or_path: str | Path) -> Any:
    """The data of YAML text, or of a file if a Path (or a one-line name that ends in .yaml or .yml) is given.

    Raises:
        ConfigError: the file cannot be read, or it is no YAML.
    """
    from megatron_mtp.config.yaml_text import load_yaml

    is_path = isinstance(text_or_path, Path) or str(text_or_path).endswith((".yaml", ".yml"))
    text = read_text(text_or_path) if is_path else str(text_or_path)
    return load_yaml(text, str(text_or_path) if is_path else "YAML")


def read_text(path: str | Path) -> str:
    """The text of a config file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        reason = "its name holds a NUL character" if "\0" in str(path) else reason
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}.") from None


def merge(cfg: RunConfig, data: Any, origin: str) -> None:
    """Overwrites the fields of `cfg` that `data` names; fields that are mappings are merged key by key.

    Fields that were removed are ignored, so that older files still open.

    Raises:
        ConfigError: every problem found; nothing is changed in that case.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: must be a mapping of sections, such as `model: {{num_layers: 8}}`.")
    changes: list[tuple[Section, str, Any]] = []
    problems = too_many_names(origin, data, field_types(RunConfig))
    phases: dict[str, Any] | None = None
    for section_name, values in ({} if problems else data).items():
        if section_name == "phases":
            phases, wrong = merged_phases(cfg.phases, values)
            problems += wrong
            continue
        try:
            section = section_of(cfg, str(section_name))
        except ConfigError as error:
            problems += error.problems
            continue
        if not isinstance(values, dict):
            problems.append(Problem(fields=(section_name,), value=values, rule="must be a mapping of its fields"))
            continue
        excess = too_many_names(str(section_name), values, field_types(type(section)))
        problems += excess
        for name, value in ({} if excess else values).items():
            try:
                if f"{section_name}.{name}" not in REMOVED:
                    changes.append((section, name, fitted(section, name, value)))
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    for section, name, value in changes:
        setattr(section, name, value)
    if phases is not None:
        cfg.phases = phases


def too_many_names(owner: str, given: dict[str, Any], known: Iterable[str]) -> list[Problem]:
    """Refuses a mapping with more names than there are, instead of naming each unknown one and the name it is near."""
    most = len({*known}) + len(REMOVED)
    rule = f"{cut(owner)}: {len(given)} names are given, and there are {most}"
    return [Problem(rule=rule)] if len(given) > most else []


def fitted(section: Section, name: str, value: Any, raw: str | None = None) -> Any:
    """`value` made to fit the field `name`; `raw` is its text on the command line, tried where only text would fit.

    Raises:
        ConfigError: there is no such field, or the value cannot fit.
    """
    types = field_types(type(section))
    if name not in types:
        raise ConfigError(unknown_field(section.SECTION, str(name), list(types)))
    old = getattr(section, name)
    if isinstance(old, dict) and isinstance(value, dict):
        value = {**old, **value}
    attempts = [(check, value), (coerce, value)]
    if raw is not None:  # `None` means null; a name such as 007 stays the text it is
        attempts[1:1] = [(check, None)] * (raw == "None") + [(check, raw)]
    for fit, candidate in attempts:
        try:
            return fit(candidate, types[name])
        except MisfitError as misfit:
            reason = str(misfit)
    raise ConfigError(Problem(fields=(f"{section.SECTION}.{name}",), value=value, rule=reason))


def section_of(cfg: RunConfig, name: str) -> Section:
    """The section `name`.

    Raises:
        ConfigError: there is none; the message names the section of a field with that name, or the nearest section.
    """
    sections = section_types()
    if name in sections:
        section: Section = getattr(cfg, name)
        return section
    if owners := [owner for owner, kind in sections.items() if name in field_types(kind)]:
        rule = f"{cut(name)}: the name of its section is missing"
        raise ConfigError(Problem(rule=rule, remedy=f"Write {' or '.join(f'{o}.{name}' for o in owners)}."))
    rule = f"{cut(name)}: there is no such section"
    remedy = RENAMED.get(name) or f"{nearest(name, sections)} Sections: {', '.join(sections)}."
    raise ConfigError(Problem(rule=rule, remedy=remedy.strip()))
