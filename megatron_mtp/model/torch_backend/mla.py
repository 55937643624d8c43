"""Multi-latent attention whose gradients are right under tensor parallelism.

Megatron-Core 0.19.2 has two defects there, both in backward passes only, so that the loss looks right:

1. The rope key is shared by all heads, and each tensor-parallel rank holds some of them. Its gradient is never summed
   over the ranks: with TP=2 linear_kv_down_proj is off by 0.25 (relative), everything below it by 0.1.
2. `finalize_model_grads` sums over TP every parameter whose name contains "q_layernorm" if qk_layernorm is on. That is
   meant for norms of heads. MLA's q_layernorm acts on a latent that all ranks hold alike unless sequence parallelism
   shards it, and its gradient came out multiplied by TP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class ExactMLASelfAttention(MLASelfAttention):
    """MLASelfAttention with both reductions corrected, and with a key/value norm where queries have no latent.

    It fits the specs of both backends: Transformer Engine's layers have the first defect without sequence parallelism.
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for param in self.q_layernorm.parameters():
                param.average_gradients_across_tp_domain = True
        if self.config.q_lora_rank is not None:
            mark_whole_weight(self.linear_q_down_proj, self.config.q_lora_rank)
        mark_whole_weight(self.linear_kv_down_proj, self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim)
        if (epsilon := getattr(self.config, "latent_norm_epsilon", None)) is not None:
            self._set_latent_norm_epsilon(epsilon)

    def _set_latent_norm_epsilon(self, epsilon: float) -> None:
        # Transformer Engine holds a latent's norm inside the projection that follows it.
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module: Any = getattr(self, name, None)
            if hasattr(module, "eps"):
                module.eps = epsilon

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of queries and of keys and values.

        Args:
            hidden_states: [s/(cp*tp), b, h] under sequence parallelism, else [s/cp, b, h].

        Returns:
            q: [.., b, q_lora_rank] (hidden_states without a query latent), and
            kv: [.., b, kv_lora_rank + qk_pos_emb_head_dim], both with the sequence length of hidden_states.
        """
        q, kv = super()._qkv_down_projection(hidden_states)
        if self.tp_group.size() == 1:
            return q, kv
        # The width is complete when this returns, so the base class takes its branch for projections that are not
        # sharded. Under sequence parallelism that branch gathers the rope key with a backward pass that sums.
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if kv.shape[-1] != sum(widths):  # our linear layers shard it, Transformer Engine's does not
            kv = gather_from_tensor_model_parallel_region(kv, group=self.tp_group)
            if self.config.sequence_parallel:
                kv = scatter_to_sequence_parallel_region(kv, group=self.tp_group)
        if self.config.sequence_parallel:
            return q, kv
        latent, rope_key = kv.split(widths, dim=-1)
        return q, torch.cat([latent, copy_to_tensor_model_parallel_region(rope_key, group=self.tp_group)], dim=-1)

    def _resolve_qk_norm_config(self, submodules: object) -> dict[str, Any]:
        # Upstream wants a fused norm and projection for queries that have no latent, which would normalise the hidden
        # state twice. Released models without a query latent (DeepSeek-V2-Lite, Moonlight) norm keys and values only.
        if self.config.qk_layernorm and self.config.q_lora_rank is None:
            names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
            return {name: getattr(submodules, name) for name in names}
        return super()._resolve_qk_norm_config(submodules)


def mark_whole_weight(linear: Any, width: int) -> None:
    """Marks a weight that every tensor-parallel rank holds in full as not sharded, so that a norm counts it once.

    Transformer Engine marks the weights of all its linear layers as sharded, those it duplicates too.

    Args:
        linear: a projection to `width` features; one whose weight is a shard is left as it is.
    """
    if linear.weight.shape[0] == width:
        linear.weight.tensor_model_parallel = False
