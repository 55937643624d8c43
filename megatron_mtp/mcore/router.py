"""Megatron-Core's MoE routers: what they record in a global tracker, and the z-loss of a repeated layer."""

from __future__ import annotations

from copy import copy

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn


def router_losses() -> dict[str, torch.Tensor]:
    """Returns and clears what the routers of this rank recorded: name -> [layers] sums over micro-batches."""
    tracker = get_moe_metrics_tracker()
    recorded = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    for entry in tracker.metrics.values():
        entry.values.zero_()
    return recorded


def share_z_loss(block: nn.Module, num_depths: int) -> None:
    """Divides the router z-loss of a repeated layer among its applications, so that the layer counts once.

    Megatron-Core 0.19.2 does so for the balancing loss; of the z-loss it divides the logged value only, after the
    gradient was attached (moe/router.py, apply_z_loss). The log divides by the coefficient, so it is right with either.
    """
    for module in block.modules():
        if isinstance(module, TopKRouter) and module.config.moe_z_loss_coeff is not None:
            module.config = copy(module.config)
            module.config.moe_z_loss_coeff /= num_depths
