"""Megatron-Core's MoE routers: what they record in a global tracker, and the z-loss of a repeated layer."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

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


class RouterLoads:
    """Counts how many tokens the routers of this rank send to each expert.

    A layer that is recomputed in the backward pass counts each token twice, and so does every tensor-parallel rank
    without sequence parallelism: shares are right, counts are not.

    Args:
        chunks: of this rank.
        num_layers: decoder layers of the whole model; layers of the MTP part are numbered after them.
        num_experts: routed experts of a layer.
        rows: layers of the whole model that have a router may have any number below this.

    Attributes:
        is_on: whether the passes of this step are counted. Switched before a step; other steps cost nothing.
        counts: [rows, num_experts] int64.
    """

    def __init__(self, chunks: Iterable[nn.Module], num_layers: int, num_experts: int, rows: int, device: torch.device):
        self.is_on = False
        self.counts = torch.zeros(rows, num_experts, dtype=torch.int64, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    row = module.layer_number - 1 + (num_layers if module.is_mtp_layer else 0)
                    module.register_forward_hook(self._counter(row))

    def begin(self, *, is_on: bool) -> None:
        """Forgets the counts, and counts in the next step or not."""
        self.is_on = is_on
        if is_on:
            self.counts.zero_()

    def _counter(self, row: int) -> Any:
        def count(module: nn.Module, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if self.is_on and module.training:
                self.counts[row] += output[1].sum(dim=0)

        return count
