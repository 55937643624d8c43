"""Megatron-Core's gated delta net where flash-linear-attention is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.ssm.gated_delta_net import common as gated_delta_net


def has_flash_linear_attention() -> bool:
    """Whether the kernels of linear attention can be imported."""
    return gated_delta_net.HAVE_FLA


@contextmanager
def pretend_flash_linear_attention() -> Iterator[None]:
    """Inside, Megatron-Core builds a gated delta net without those kernels, which its path in plain PyTorch never calls."""
    before = gated_delta_net.HAVE_FLA
    gated_delta_net.HAVE_FLA = True
    try:
        yield
    finally:
        gated_delta_net.HAVE_FLA = before
