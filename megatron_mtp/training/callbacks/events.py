"""Calls an event of every callback, and joins and checks the metrics that they return."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

from megatron_mtp.errors import ConfigError
from megatron_mtp.training.callbacks.base import Callback

RESERVED = ("kind", "iteration", "time", "name")
"""Keys of every line of metrics.jsonl that no metric may have."""


def call_event(
    callbacks: Sequence[Callback], event: str, *arguments: Any, taken: Collection[str] = ()
) -> dict[str, float]:
    """Calls an event of every callback in order and joins the metrics that they return, without those that are None.

    Args:
        arguments: of the event.
        taken: names that the record has already.

    Raises:
        ConfigError: what one returns is no mapping of names to numbers, or a name is taken, by an earlier callback too;
            or it calls sys.exit.
    """
    metrics: dict[str, float] = {}
    for callback in callbacks:
        try:
            returned = getattr(callback, event)(*arguments)
        except SystemExit as end:
            raise ConfigError(
                f"callbacks: {callback.name}.{event} calls sys.exit({end.code!r}), which would end this rank alone and "
                "without a checkpoint. Call run.request_stop('reason')."
            ) from end
        source = f"callbacks: {callback.name}.{event} returns"
        if not isinstance(returned, dict | None):
            raise ConfigError(f"{source} a {type(returned).__name__}: return a dict, name -> number, or None.")
        for name, value in (returned or {}).items():
            if value is None:
                continue
            if name in taken or name in metrics or name in RESERVED:
                raise ConfigError(
                    f"{source} {name!r}: the record has a value of that name. Choose another, such as "
                    "my_area/thing_unit."
                )
            if not isinstance(name, str) or not isinstance(value, Real):
                kind = type(value).__name__
                raise ConfigError(f"{source} {name!r} = a {kind}: must be a number; of a tensor, tensor.item().")
            metrics[name] = value if isinstance(value, int | float) else float(value)
    return metrics
