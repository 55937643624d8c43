"""Checks a value against a field's type, and converts values read from text.

The types of config fields are a closed set (numbers, text, flags, literals, lists, dicts, unions), so this small file
does it. pydantic would do the same for 0.25 s of import time, half of what `show` may take.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from megatron_mtp.config.knob import per_class
from megatron_mtp.config.quantity import read_number

NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


class MisfitError(Exception):
    """A value does not fit; the text says what would, e.g. "must be an integer"."""


@per_class
def field_types(section: type) -> dict[str, Any]:
    """The resolved type of every field of a config section, by name."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section) if get_origin(hints[field.name]) is not ClassVar}


def describe(wanted: Any) -> str:
    """A type in words: "an integer or null", "one of 'adam', 'sgd', 'muon'", "a list of integers"."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if wanted is list or origin is list:
        return f"a list, each item {describe(args[0])}" if args else "a list"
    if wanted is dict or origin is dict:
        return f"a mapping of names, each value {describe(args[1])}" if args and args[1] is not Any else "a mapping"
    return NAMES.get(wanted, getattr(wanted, "__name__", str(wanted)))


def check(value: Any, wanted: Any) -> Any:
    """Returns `value` if it is of type `wanted`; an integer fits where a number is wanted, a tuple where a list is.

    Raises:
        MisfitError: it is not.
    """
    return _fit(value, wanted, from_text=False)


def coerce(value: Any, wanted: Any) -> Any:
    """Makes a value that was read from YAML or the command line fit.

    "8" and 8.0 become 8 where an integer is wanted, numbers become text where only text is wanted. Nothing is rounded,
    and a flag is never a number.

    Raises:
        MisfitError: it cannot fit.
    """
    return _fit(value, wanted, from_text=True)


def _fit(value: Any, wanted: Any, from_text: bool) -> Any:
    origin, args = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(value, wanted, from_text)
    if origin is Literal:
        if value in args and any(type(value) is type(arg) for arg in args):
            return value
        if from_text and value is None and "null" in args:
            return "null"  # written without quotes, where nothing else could be meant
        raise MisfitError(f"must be {describe(wanted)}")
    if wanted is list or origin is list:
        return _fit_list(value, wanted, from_text)
    if wanted is dict or origin is dict:
        return _fit_dict(value, wanted, from_text)
    return _fit_scalar(value, wanted, from_text)


def _fit_union(value: Any, wanted: Any, from_text: bool) -> Any:
    for lenient in (False, True) if from_text else (False,):
        for arg in get_args(wanted):
            try:
                return _fit(value, arg, lenient)
            except MisfitError:
                continue
    raise MisfitError(f"must be {describe(wanted)}")


def _fit_list(value: Any, wanted: Any, from_text: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise MisfitError(f"must be {describe(wanted)}")
    (item_type,) = get_args(wanted) or (Any,)
    try:
        return [_fit(item, item_type, from_text) for item in value]
    except MisfitError:
        raise MisfitError(f"must be {describe(wanted)}") from None


def _fit_dict(value: Any, wanted: Any, from_text: bool) -> dict[str, Any]:
    _, value_type = get_args(wanted) or (str, Any)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MisfitError(f"must be {describe(wanted)}")
    try:
        return {key: _fit(item, value_type, from_text) for key, item in value.items()}
    except MisfitError:
        raise MisfitError(f"must be {describe(wanted)}") from None


def _fit_scalar(value: Any, wanted: type, from_text: bool) -> Any:
    if type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        return _as_float(value) if from_text else value
    if from_text and wanted is float and isinstance(value, str):
        return _parse(value, float)
    if from_text and wanted is int and isinstance(value, str):
        return _parse(value, int)
    if from_text and wanted is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if from_text and wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(wanted, type) and wanted not in NAMES and isinstance(value, wanted):
        return value  # a section of the container
    raise MisfitError(f"must be {describe(wanted)}")


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _parse(text: str, number: type) -> Any:
    try:
        return read_number(text, number)
    except ValueError:
        raise MisfitError(f"must be {describe(number)}") from None
