"""Config to plain data and YAML and back. Nothing in the data can name code to run."""

from __future__ import annotations

import difflib
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_mtp.config.base import RENAMED, Section, unknown_field
from megatron_mtp.config.coerce import MisfitError, check, coerce, field_types
from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.errors import ConfigError


def to_dict(cfg: Section) -> dict[str, Any]:
    """Plain data: dicts, lists, numbers, text."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}  # type: ignore[arg-type]
    return {name: to_dict(v) if isinstance(v, Section) else deepcopy(v) for name, v in values.items()}


def to_yaml(cfg: ConfigContainer, path: str | Path | None = None) -> str:
    """The whole config as YAML; also written to `path` if it is given."""
    from megatron_mtp.config.yaml_text import dump_yaml

    text = dump_yaml(to_dict(cfg))
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def from_dict(data: dict[str, Any]) -> ConfigContainer:
    """A config with these values; what is not given keeps its default.

    Raises:
        ConfigError: unknown names or values of the wrong type, all of them.
    """
    cfg = ConfigContainer()
    merge(cfg, data, origin="config")
    return cfg


def from_yaml(text_or_path: str | Path) -> ConfigContainer:
    """A config from YAML text, or from a file if a Path (or a one-line name that ends in .yaml or .yml) is given.

    Raises:
        ConfigError: the file cannot be read, or as `from_dict`.
    """
    from megatron_mtp.config.yaml_text import load_yaml

    is_path = isinstance(text_or_path, Path) or str(text_or_path).endswith((".yaml", ".yml"))
    text = read_text(text_or_path) if is_path else str(text_or_path)
    return from_dict(load_yaml(text, str(text_or_path) if is_path else "YAML") or {})


def read_text(path: str | Path) -> str:
    """The text of a config file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}.") from None


def merge(cfg: ConfigContainer, data: Any, origin: str) -> None:
    """Overwrites the fields of `cfg` that `data` names; fields that are mappings are merged key by key.

    Raises:
        ConfigError: every problem found; nothing is changed in that case.
    """
    changes, problems = collect(cfg, data, origin)
    if problems:
        raise ConfigError(problems)
    for section, name, value in changes:
        setattr(section, name, value)


def collect(cfg: ConfigContainer, data: Any, origin: str) -> tuple[list[tuple[Section, str, Any]], list[str]]:
    """The assignments that `data` asks for, and what is wrong with it."""
    if not isinstance(data, dict):
        return [], [f"{origin}: must be a mapping of sections, such as `model: {{num_layers: 8}}`."]
    changes: list[tuple[Section, str, Any]] = []
    problems: list[str] = []
    for section_name, values in data.items():
        if section_name not in field_types(ConfigContainer):
            problems.append(unknown_section(str(section_name)))
            continue
        section: Section = getattr(cfg, section_name)
        if not isinstance(values, dict):
            problems.append(f"{section_name} = {values!r}: must be a mapping of its fields.")
            continue
        for name, value in values.items():
            try:
                changes.append((section, name, fitted(section, name, value)))
            except ConfigError as error:
                problems += error.problems
    return changes, problems


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
            reason = misfit
    raise ConfigError(f"{section.SECTION}.{name} = {value!r}: {reason}.")


def unknown_section(name: str) -> str:
    """Says that there is no section `name`, and where a field of that name is."""
    sections = field_types(ConfigContainer)
    if owners := [owner for owner, kind in sections.items() if name in field_types(kind)]:
        return f"{name}: the name of its section is missing. Write {' or '.join(f'{o}.{name}' for o in owners)}."
    if name in RENAMED:
        return f"{name}: there is no such section. Use {RENAMED[name]}."
    close = difflib.get_close_matches(name, sections, n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"{name}: there is no such section.{meant} Sections: {', '.join(sections)}."
