"""Pretraining with multi-token prediction on Megatron-Core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_mtp.config import ConfigContainer

if TYPE_CHECKING:
    from megatron_mtp.launch.entry import main
    from megatron_mtp.training.pretrain import pretrain

__version__ = "0.1.0"
__all__ = ["ConfigContainer", "main", "pretrain"]


def __getattr__(name: str) -> Any:
    """`pretrain` and `main` are found here but imported on first use: torch takes seconds to import."""
    if name == "main":
        from megatron_mtp.launch.entry import main

        return main
    if name == "pretrain":
        from megatron_mtp.observe.logs import quiet

        with quiet():
            from megatron_mtp.training.pretrain import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
