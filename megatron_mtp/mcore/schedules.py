"""Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from megatron.core.pipeline_parallel import schedules

from megatron_mtp.mcore.patches import replaced


def watch_calls(around: Callable[[str], AbstractContextManager[Any]]) -> AbstractContextManager[None]:
    """Inside, each call of a chunk by a schedule runs within `around("forward")` or `around("backward")`.

    That is what a pipeline stage does between two messages, the loss function and the gradient hooks included.
    """

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(schedules, f"{name}_step")

        def call(*args: Any, **kwargs: Any) -> Any:
            with around(name):
                return original(*args, **kwargs)

        return call

    return replaced(schedules, forward_step=watched("forward"), backward_step=watched("backward"))
