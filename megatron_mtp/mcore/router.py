"""What MoE routers record in Megatron-Core's global tracker."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker


def router_losses(num_layers: int) -> dict[str, torch.Tensor]:
    """Takes and clears what MoE routers recorded in this step on this rank: name -> [num_layers] sums over micro-batches."""
    tracker = get_moe_metrics_tracker()
    recorded = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    for entry in tracker.metrics.values():
        entry.values.zero_()
    return {name: values[:num_layers] for name, values in recorded.items()}
