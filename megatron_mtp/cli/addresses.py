"""Refuses storage behind an address, such as s3://bucket/run, in every argument and option that takes a path, but for
those that a command names with `accepts_addresses`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

import typer

from megatron_mtp.errors import ConfigError, Problem
from megatron_mtp.storage.address import address_problem, address_text, is_address

TEXT_PATHS = frozenset(
    "checkpoint checkpoints data logs mount name out output prefix prefixes run sets source tokenizer".split()
)
"""Parameters that take a path as text; parameters of type Path are known by their values."""

_ACCEPTED = "accepted_addresses"


def accepts_addresses[F: Callable[..., None]](*names: str) -> Callable[[F], F]:
    """Marks the parameters of a command that take addresses, too. They must be texts: a Path changes them."""

    def mark(command: F) -> F:
        setattr(command, _ACCEPTED, frozenset(names))
        return command

    return mark


def refuse_addresses(command: Callable[..., None]) -> Callable[..., None]:
    """The command itself, which first refuses addresses in its paths."""
    accepted: frozenset[str] = getattr(command, _ACCEPTED, frozenset())

    @functools.wraps(command)
    def checked(**values: Any) -> None:
        problems = [
            Problem(fields=(name,), value=text, rule=rule)
            for name, value in values.items()
            for text in _addresses(name, value)
            if (rule := address_problem(text, is_accepted=name in accepted))
        ]
        if problems:
            raise ConfigError(problems)
        command(**values)

    return checked


def refuse_addresses_in(app: typer.Typer) -> typer.Typer:
    """`refuse_addresses` for each command of an app."""
    for info in app.registered_commands:
        if info.callback is not None and not hasattr(info.callback, "__wrapped__"):
            info.callback = refuse_addresses(info.callback)
    return app


def _addresses(name: str, value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, PurePath) and is_address(item):
            yield address_text(item)
        elif isinstance(item, str) and name in TEXT_PATHS:
            yield from filter(is_address, (item, item.partition("=")[2]))  # the second of NAME=PREFIX
