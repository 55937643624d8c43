"""Callbacks of one's own that `train.callbacks` names, and what every callback must be."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from types import FunctionType

from megatron_mtp.errors import ConfigError, Problem, nearest
from megatron_mtp.recipes.own import OwnCode
from megatron_mtp.training.callbacks.base import Callback

METHODS = {name: method for name, method in vars(Callback).items() if isinstance(method, FunctionType)}
"""What the training calls, by name; those that begin with `on_` are events."""


def named_callbacks(names: Sequence[str]) -> list[Callback]:
    """One callback of each class, made without arguments.

    Args:
        names: `module:Class` or `path/file.py:Class`, as in `train.callbacks`.

    Raises:
        ConfigError: one cannot be imported or is no callback, or its constructor fails.
    """
    return [code.run(kind) for code, kind in _found(names)]


def check_named_callbacks(names: Sequence[str]) -> None:
    """Imports the classes and checks them, but makes no callback.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    _found(names)


def _found(names: Sequence[str]) -> list[tuple[OwnCode, type[Callback]]]:
    found: list[tuple[OwnCode, type[Callback]]] = []
    problems: list[Problem] = []
    for name in names:
        code = OwnCode(name, "class", Problem(fields=("train.callbacks",), value=name, rule=""))
        try:
            kind = code.find()
            if not issubclass(kind, Callback):
                raise code.error("must be a subclass of megatron_mtp.training.callbacks.Callback")
            rules = [*_constructor_rules(kind), *class_rules(kind)]
            problems += [problem for rule in rules for problem in code.error(rule).problems]
            found.append((code, kind))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def check_callbacks(callbacks: list[Callback]) -> list[Callback]:
    """`callbacks`, if their methods can be called, and each that keeps state has a name of its own.

    Raises:
        ConfigError: a method cannot be called, or two would share their state in the checkpoint.
    """
    if wrong := [rule for kind in dict.fromkeys(map(type, callbacks)) for rule in class_rules(kind)]:
        raise ConfigError([f"callbacks: {rule}." for rule in wrong])
    names = Counter(c.name for c in callbacks if type(c).state_dict is not Callback.state_dict)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(
            f"callbacks: {', '.join(twice)} is given more than once, and its state in the checkpoint has that name. "
            "Override `name` so that each has its own."
        )
    return callbacks


def class_rules(kind: type[Callback]) -> list[str]:
    """What is wrong with the methods of a callback: an event that does not exist, or arguments that do not fit."""
    known = [name for name in METHODS if name.startswith("on_")]
    wrong = [
        f"{kind.__name__}.{name} would never be called: there is no such event.{nearest(name, known)}"
        for name in dir(kind)
        if name.startswith("on_") and name not in known and callable(getattr(kind, name))
    ]
    for name, method in METHODS.items():
        wanted = inspect.signature(method).parameters
        try:
            inspect.signature(getattr(kind, name)).bind(*wanted)
        except TypeError:
            wrong.append(f"{kind.__name__}.{name} is called as {name}({', '.join(list(wanted)[1:])}): give it these")
    return wrong


def _constructor_rules(kind: type[Callback]) -> list[str]:
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        return [f"is made without arguments: {error}. Give them defaults, or name a subclass that sets them"]
    return []
