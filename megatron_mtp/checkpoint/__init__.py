"""Saves and resumes runs at any layout.

`Checkpointer` is imported on first use, so that the checks before a run need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mtp.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]


def __getattr__(name: str) -> Any:
    if name != "Checkpointer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_mtp.checkpoint.checkpointer import Checkpointer

    return Checkpointer
