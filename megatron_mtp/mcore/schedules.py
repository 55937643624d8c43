"""Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from megatron.core.pipeline_parallel import schedules


@contextmanager
def watch_calls(around: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Inside, every call of a chunk by a schedule runs within `around("forward")` or `around("backward")`: what a pipeline stage
    does between two messages, the loss function and the gradient hooks included."""
    before = {name: getattr(schedules, f"{name}_step") for name in ("forward", "backward")}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with around(name):
                return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(schedules, f"{name}_step", watched(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(schedules, f"{name}_step", function)
