"""Builds the parts of the decoder from the state dict of a trained model.

Names and layouts are those of Megatron-Core's local specs (our torch backend), each tensor as this tensor-parallel rank
holds it. Weights are copied into the forms that decoding reads (norm weights multiplied in, coordinates of RoPE pairs
adjacent, packed for oneDNN), so the trained model may be freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.decode.attention import GroupedAttention, LatentAttention
from megatron_mtp.decode.block import Block, Depth, InputProjection
from megatron_mtp.decode.feed_forward import Dense, Experts, activation, chooser, router
from megatron_mtp.decode.linear import Linear, linear
from megatron_mtp.decode.norm import LayerNorm, Norm, RMSScale, WeightedRMS
from megatron_mtp.decode.rope import pair_order
from megatron_mtp.decode.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one tensor-parallel rank, in the forms that the parts need.

    Args:
        model: finalized.
        tensors: state dict of this rank.
        tp: its group.
        dtype: dtype of the decoder's weights and residual stream.
        device: where the decoder runs.
    """

    model: ModelConfig
    tensors: Mapping[str, Tensor | None]
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device

    def get(self, name: str) -> Tensor:
        """The tensor in fp32 on the device, to be cast after other weights are multiplied in."""
        return filled(self.tensors[name]).detach().to(self.device, torch.float32)

    def find(self, name: str) -> Tensor | None:
        """As `get`; None if the model has no such tensor."""
        return None if self.tensors.get(name) is None else self.get(name)

    def gathered(self, name: str, rows: int) -> Tensor:
        """A weight of `rows` rows that Megatron-Core shards over tp and decoding replicates."""
        tensor = self.get(name)
        return tensor if tensor.shape[0] == rows else self.tp.gather(tensor, dim=0)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A projection in the decoder's dtype."""
        return linear(weight.to(self.dtype).clone(), None if bias is None else bias.to(self.dtype))

    def after_sum(self, bias: Tensor | None) -> Tensor | None:
        """The bias of a projection whose results are summed over ranks: only rank 0 adds it."""
        return bias if self.tp.rank == 0 else None

    def norm(self, name: str, width: int, eps: float | None = None) -> tuple[Norm, Tensor | None]:
        """A norm, and the weight [width] to multiply into the next projections (None: the norm applies its own)."""
        weight, eps = self.get(f"{name}.weight"), eps or self.model.layernorm_epsilon
        weight = weight + 1 if self.model.layernorm_zero_centered_gamma else weight
        if self.model.normalization == "RMSNorm":
            return RMSScale(width, eps, self.device), weight
        bias = self.find(f"{name}.bias")
        return LayerNorm(weight.to(self.dtype), None if bias is None else bias.to(self.dtype), eps), None

    def full_norm(self, name: str) -> Norm:
        """A norm that applies its own weight."""
        norm, weight = self.norm(name, self.model.hidden_size)
        return norm if weight is None else WeightedRMS(norm, weight.to(self.dtype))


def scaled(weight: Tensor, columns: Tensor | None) -> Tensor:
    """weight [out, in] with each column multiplied by the weight of the norm before it."""
    return weight if columns is None else weight * columns


def block(weights: Weights, prefix: str, dense_width: int | None) -> Block:
    """One transformer layer, trunk or MTP.

    Args:
        dense_width: width of its dense feed-forward block; None: it has experts.
    """
    width = weights.model.hidden_size
    first, first_weight = weights.norm(f"{prefix}input_layernorm", width)
    second, second_weight = weights.norm(f"{prefix}pre_mlp_layernorm", width)
    attend: Callable[[Weights, str, Tensor | None], GroupedAttention | LatentAttention]
    attend = _latent if weights.model.multi_latent_attention else _grouped
    feed_forward: Dense | Experts
    if dense_width is None:
        feed_forward = _experts(weights, f"{prefix}mlp.", second_weight)
    else:
        feed_forward = _dense(weights, f"{prefix}mlp.", second_weight, dense_width)
    return Block(first, attend(weights, f"{prefix}self_attention.", first_weight), second, feed_forward)


def depth(weights: Weights, prefix: str, dense_width: int | None) -> Depth:
    """One MTP layer. Arguments as `block`."""
    model, h = weights.model, weights.model.hidden_size
    layer = block(weights, f"{prefix}mtp_model_layer.", dense_width)
    final = weights.full_norm(f"{prefix}final_layernorm")
    if model.mtp_variant == "parallel":
        return Depth(None, layer, final)
    enorm, enorm_weight = weights.norm(f"{prefix}enorm", h)
    hnorm, hnorm_weight = weights.norm(f"{prefix}hnorm", h)
    weight = weights.gathered(f"{prefix}eh_proj.weight", h)
    if enorm_weight is not None and hnorm_weight is not None:
        weight = weight * torch.cat((enorm_weight, hnorm_weight))
    return Depth(InputProjection(enorm, hnorm, weights.linear(weight)), layer, final)


def _grouped(weights: Weights, prefix: str, columns: Tensor | None) -> GroupedAttention:
    model, tp = weights.model, weights.tp
    heads, groups = model.num_attention_heads // tp.size, model.num_query_groups // tp.size
    width = model.kv_channels
    order = _head_order(model)
    weight = _by_kind(weights.get(f"{prefix}linear_qkv.weight"), heads, groups, width, order)
    bias = weights.find(f"{prefix}linear_qkv.bias")
    head_norm = None
    if model.qk_layernorm:
        parts = [weights.get(f"{prefix}{name}_layernorm.weight")[order] for name in ("q", "k")]
        offset = 1.0 if model.layernorm_zero_centered_gamma else 0.0
        rows = [part.expand(count, -1) for part, count in zip(parts, (heads, groups), strict=True)]
        scale = RMSScale(width, model.layernorm_epsilon, weights.device)
        head_norm = WeightedRMS(scale, (torch.cat(rows) + offset).to(weights.dtype))
    return GroupedAttention(
        qkv=weights.linear(
            scaled(weight, columns), None if bias is None else _by_kind(bias, heads, groups, width, order)
        ),
        out=weights.linear(
            weights.get(f"{prefix}linear_proj.weight"), weights.after_sum(weights.find(f"{prefix}linear_proj.bias"))
        ),
        heads=heads,
        groups=groups,
        width=width,
        head_norm=head_norm,
        tp=tp,
    )


def _head_order(model: ModelConfig) -> list[int]:
    is_rotated, width = model.position_embedding_type == "rope", model.kv_channels
    return pair_order(width, model.rotary_percent) if is_rotated else list(range(width))


def _by_kind(rows: Tensor, heads: int, groups: int, width: int, order: list[int]) -> Tensor:
    """Megatron's rows, q q k v for each group, -> [all q; all k; all v], coordinates of q and k heads in `order`."""
    each = heads // groups
    grouped = rows.view(groups, each + 2, width, *rows.shape[1:])
    query, key, value = grouped[:, :each], grouped[:, each : each + 1], grouped[:, each + 1 :]
    parts = (query[:, :, order], key[:, :, order], value)
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def _latent(weights: Weights, prefix: str, columns: Tensor | None) -> LatentAttention:
    model, tp = weights.model, weights.tp
    heads, rank = model.num_attention_heads // tp.size, model.kv_lora_rank
    eps = model.latent_norm_epsilon
    kv_down = weights.gathered(f"{prefix}linear_kv_down_proj.weight", rank + model.qk_pos_emb_head_dim)
    query_norm = query_up = latent_norm = None
    if model.q_lora_rank is None:
        query_down = weights.get(f"{prefix}linear_q_proj.weight")
    else:
        query_down = weights.gathered(f"{prefix}linear_q_down_proj.weight", model.q_lora_rank)
        up, weight = weights.get(f"{prefix}linear_q_up_proj.weight"), None
        if model.qk_layernorm:
            query_norm, weight = weights.norm(f"{prefix}q_layernorm", model.q_lora_rank, eps)
        query_up = weights.linear(scaled(up, weight))
    kv_up = weights.get(f"{prefix}linear_kv_up_proj.weight").view(heads, model.qk_head_dim + model.v_head_dim, rank)
    if model.qk_layernorm:
        latent_norm, weight = weights.norm(f"{prefix}kv_layernorm", rank, eps)
        kv_up = scaled(kv_up, weight)
    key_up, value_up = kv_up.split((model.qk_head_dim, model.v_head_dim), dim=1)
    return LatentAttention(
        down=weights.linear(scaled(torch.cat((query_down, kv_down)), columns)),
        query_norm=query_norm,
        query_up=query_up,
        latent_norm=latent_norm,
        key_up=key_up.to(weights.dtype).contiguous(),
        value_up=value_up.transpose(1, 2).to(weights.dtype).contiguous(),
        out=weights.linear(
            weights.get(f"{prefix}linear_proj.weight"), weights.after_sum(weights.find(f"{prefix}linear_proj.bias"))
        ),
        heads=heads,
        splits=(query_down.shape[0], rank, model.qk_pos_emb_head_dim),
        scale=_latent_scale(model),
        tp=tp,
    )


def _latent_scale(model: ModelConfig) -> float:
    """Softmax scale of MLA with YaRN's correction. Source: Megatron-Core, MultiLatentAttention.__init__."""
    factor = model.rotary_scaling_factor
    correction = 1.0 if factor <= 1 else 0.1 * model.mscale_all_dim * math.log(factor) + 1.0
    return correction**2 / math.sqrt(model.qk_head_dim + model.qk_pos_emb_head_dim)


def _dense(weights: Weights, prefix: str, columns: Tensor | None, width: int) -> Dense:
    """A feed-forward block of total width `width`, of which this rank computes its share."""
    up, down = weights.get(f"{prefix}linear_fc1.weight"), weights.get(f"{prefix}linear_fc2.weight")
    bias = weights.find(f"{prefix}linear_fc1.bias")
    if down.shape[1] == width and weights.tp.size > 1:  # experts that expert_tensor_parallel_size = 1 does not shard
        up, down = _share(weights, up, width), down.chunk(weights.tp.size, dim=1)[weights.tp.rank]
        bias = None if bias is None else _share(weights, bias, width)
    return Dense(
        up=weights.linear(scaled(up, columns), bias),
        down=weights.linear(down, weights.after_sum(weights.find(f"{prefix}linear_fc2.bias"))),
        act=activation(weights.model),
        tp=weights.tp,
    )


def _share(weights: Weights, rows: Tensor, width: int) -> Tensor:
    """This rank's rows of [gate; up] or of up."""
    parts = rows.unflatten(0, (-1, width))
    return parts.chunk(weights.tp.size, dim=1)[weights.tp.rank].flatten(0, 1)


def _experts(weights: Weights, prefix: str, columns: Tensor | None) -> Experts:
    model = weights.model
    dtype = {"fp32": torch.float32, "fp64": torch.float64, None: weights.dtype}[model.moe_router_dtype]
    bias = weights.find(f"{prefix}router.expert_bias")
    gate, shared = weights.find(f"{prefix}shared_experts.gate_weight"), model.moe_shared_expert_intermediate_size
    return Experts(
        router=router(
            scaled(weights.get(f"{prefix}router.weight"), columns), weights.find(f"{prefix}router.bias"), dtype
        ),
        choose=chooser(model, bias),
        experts=[
            _dense(weights, f"{prefix}experts.local_experts.{index}.", columns, filled(model.moe_ffn_hidden_size))
            for index in range(filled(model.num_moe_experts))
        ],
        shared=_dense(weights, f"{prefix}shared_experts.", columns, shared) if shared else None,
        gate=None if gate is None else scaled(gate, columns).t().to(weights.dtype).contiguous(),
        tp=weights.tp,
    )
