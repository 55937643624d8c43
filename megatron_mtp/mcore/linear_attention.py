"""Megatron-Core's gated delta net where flash-linear-attention is not installed."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron.core.ssm.gated_delta_net import common as gated_delta_net

from megatron_mtp.mcore.patches import replaced


def has_flash_linear_attention() -> bool:
    """Whether the kernels of linear attention can be imported."""
    return gated_delta_net.HAVE_FLA


def pretend_flash_linear_attention() -> AbstractContextManager[None]:
    """Inside, a gated delta net can be built without those kernels, which its path in plain PyTorch never calls."""
    return replaced(gated_delta_net, HAVE_FLA=True)
