"""Megatron-Core's selective recomputation where Transformer Engine is not installed."""

from __future__ import annotations

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput


class CheckpointWithoutFP8(CheckpointWithoutOutput):
    """Recomputation of norms, latents and activations without Transformer Engine.

    Upstream reads its default, fp8=False, as "FP8 may be on" and asks Transformer Engine, which ends in a NameError.
    """

    def __init__(self, fp8: object = False):
        super().__init__(fp8 or None)


def install() -> None:
    """Lets Megatron-Core's layers recompute without Transformer Engine. Does nothing where it is installed."""
    if not HAVE_TE:
        tensor_parallel.CheckpointWithoutOutput = CheckpointWithoutFP8


def uninstall() -> None:
    """Undoes `install`."""
    tensor_parallel.CheckpointWithoutOutput = CheckpointWithoutOutput
