"""Lists and dicts of a finalized config: equal to plain ones, written as plain ones, and never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from megatron_mtp.errors import ConfigError, Problem


class FrozenList(list[Any]):
    """A list that refuses changes. A copy, also a deep one or one through pickle, is a plain list."""

    __slots__ = ("name",)

    def __init__(self, items: Iterable[Any] = (), name: str = "config"):
        super().__init__(frozen(item, name) for item in items)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class FrozenDict(dict[str, Any]):
    """A dict that refuses changes. A copy, also a deep one or one through pickle, is a plain dict."""

    __slots__ = ("name",)

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), name: str = "config"):
        super().__init__({key: frozen(value, name) for key, value in dict(items).items()})
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def frozen(value: Any, name: str) -> Any:
    """`value` with every list and dict in it frozen; `name` is the field that holds it."""
    if isinstance(value, list | tuple):
        return FrozenList(value, name)
    return FrozenDict(value, name) if isinstance(value, dict) else value


def refuse_change(name: str, value: Any) -> NoReturn:
    """Says that `name = value` can no longer be set."""
    raise ConfigError(
        Problem(
            fields=(name,),
            value=value,
            rule="the config is finalized and can no longer change",
            remedy="Change a copy (cfg.copy()) and finalize it.",
        )
    )


def _refuse(self: FrozenList | FrozenDict, *_: Any, **__: Any) -> NoReturn:
    refuse_change(self.name, self)


for _kind in (FrozenList, FrozenDict):
    for _name in (
        "append clear extend insert pop popitem remove reverse setdefault sort update "
        "__delitem__ __iadd__ __imul__ __ior__ __setitem__"
    ).split():
        if hasattr(_kind, _name):
            setattr(_kind, _name, _refuse)
