"""Reads plain data, as JSON or YAML give it, into a dataclass whose fields are declared with `knob`.

Keys, types and ranges are those of the fields, so the dataclass is the one description of the data's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast, get_args, get_origin

from megatron_mtp.config.coerce import MisfitError, check, field_types
from megatron_mtp.config.knob import broken_rule
from megatron_mtp.errors import Problem, nearest


def read_form[T](kind: type[T], data: Any, path: str = "") -> tuple[T | None, list[Problem]]:
    """An instance of `kind`, or None and everything that is wrong with the data.

    Args:
        path: name of the data in messages, such as "costs.head".
    """
    problems: list[Problem] = []
    found = _read(kind, data, path, problems)
    return (None, problems) if problems else (cast(T, found), [])


def _read(wanted: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    if is_dataclass(wanted):
        return _read_dataclass(cast(type, wanted), value, path, problems)
    if value is not None and (inner := [arg for arg in get_args(wanted) if is_dataclass(arg)]) and _is_optional(wanted):
        return _read_dataclass(cast(type, inner[0]), value, path, problems)
    if get_origin(wanted) is dict and is_dataclass(item := get_args(wanted)[1]):
        if isinstance(value, Mapping):
            return {key: _read(item, found, _join(path, key), problems) for key, found in value.items()}
        problems.append(_no_mapping(path, value))
        return None
    try:
        return check(value, wanted)
    except MisfitError as misfit:
        problems.append(Problem(fields=(path,), value=value, rule=str(misfit)))
        return None


def _read_dataclass(kind: type, data: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(_no_mapping(path, data))
        return None
    before, types, values = len(problems), field_types(kind), {}
    for key in data:
        if key not in types:
            rule = f"there is no such field.{nearest(str(key), types)}"
            problems.append(Problem(fields=(_join(path, key),), rule=rule, remedy=f"Known: {', '.join(types)}."))
    for field in fields(kind):
        name = _join(path, field.name)
        if field.name in data:
            so_far = len(problems)
            value = values[field.name] = _read(types[field.name], data[field.name], name, problems)
            broken = None if len(problems) > so_far else broken_rule(kind, field.name, value)
            if broken is not None:
                problems.append(Problem(fields=(name,), value=value, rule=broken))
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(Problem(fields=(name,), rule="is missing"))
    return kind(**values) if len(problems) == before else None


def _is_optional(wanted: Any) -> bool:
    return type(None) in get_args(wanted)


def _no_mapping(path: str, value: Any) -> Problem:
    return Problem(fields=(path,) if path else (), value=value, rule="must be a mapping of names")


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
