"""Floating-point operations of training, in Megatron's convention. Pure arithmetic.

A multiply-add counts as two; the backward pass as twice the forward pass; causal attention as half the square; routers,
softmax, norms of the trunk and recomputation are not counted. With the trunk frozen its backward pass is not counted
either, and neither are the weight gradients of a head that MTP losses do not reach.

Source: megatron.training 0.19.2, training.py `num_floating_point_operations`; compared with it in tests.
"""

from __future__ import annotations

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.parallel.params import linear_pattern, moe_pattern, mtp_dense_width, padded_vocab_size


def train_flops_per_token(model: ModelConfig) -> float:
    """Forward and backward operations for one token of a full sample, MTP layers and all heads included.

    Args:
        model: finalized, with a known vocabulary size.

    Returns:
        Operations; times global_batch_size * seq_length they make one step.
    """
    depths = Depths.of(model).count
    trunk_passes = 1 if model.mtp_freeze_trunk else 3
    head_is_reached = not (model.mtp_freeze_trunk or model.mtp_detach_heads)
    logits = forward_flops_logits(model)
    kinds = zip(moe_pattern(model), linear_pattern(model), strict=True)
    trunk = sum(forward_flops_layer(model, is_moe, is_linear=linear) for is_moe, linear in kinds)
    mtp = 3 * forward_flops_mtp(model) + (3 if head_is_reached else 2) * logits
    return trunk_passes * (trunk + logits) + depths * mtp


def forward_flops_layer(
    model: ModelConfig, is_moe: bool, *, is_linear: bool = False, dense_width: int | None = None
) -> float:
    """One transformer layer for one token, attention over its whole causal past on average.

    Args:
        dense_width: width of its feed-forward block without experts; None: ffn_hidden_size.
    """
    matrices = 3 if model.gated_linear_unit else 2
    if is_moe:
        width = filled(model.moe_ffn_hidden_size) * model.moe_router_topk
        width += model.moe_shared_expert_intermediate_size or 0  # None: no shared expert
    else:
        width = model.ffn_hidden_size if dense_width is None else dense_width
    return forward_flops_attention(model, is_linear) + 2 * model.hidden_size * width * matrices


def forward_flops_attention(model: ModelConfig, is_linear: bool) -> float:
    """The attention block of one decoder layer for one token."""
    if is_linear:
        return _gated_delta_net(model)
    return _latent_attention(model) if model.multi_latent_attention else _attention(model)


def forward_flops_mtp(model: ModelConfig) -> float:
    """One MTP layer for one token, without its pass through the head."""
    h = model.hidden_size
    joint = h if model.mtp_variant == "parallel" else 3 * h + 2 * h * h
    width = mtp_dense_width(model)
    return 2 * joint + forward_flops_layer(model, width is None, dense_width=width)


def forward_flops_logits(model: ModelConfig) -> float:
    """One pass of one token through the output head."""
    return 2 * model.hidden_size * padded_vocab_size(model)


def _attention(model: ModelConfig) -> float:
    h, d = model.hidden_size, model.kv_channels
    queries, keys_values = d * model.num_attention_heads, 2 * d * model.num_query_groups
    gate = queries if model.attention_output_gate else 0
    return 2 * (h * (queries + keys_values + gate) + queries * h) + 2 * model.seq_length * queries


def _gated_delta_net(model: ModelConfig) -> float:
    """Four products of a head's state [v, v] in each step: KK^T, VK^T, the update of the state, and the query's."""
    heads = model.linear_num_value_heads
    keys, values = model.linear_num_key_heads * model.linear_key_head_dim, heads * model.linear_value_head_dim
    projections = model.hidden_size * (2 * keys + 2 * values + 2 * heads + values)
    convolution = model.linear_conv_kernel_dim * (2 * keys + values)
    return 2 * (projections + convolution + 4 * heads * model.linear_value_head_dim**2)


def _latent_attention(model: ModelConfig) -> float:
    h, n, s = model.hidden_size, model.num_attention_heads, model.seq_length
    head = model.qk_head_dim + model.qk_pos_emb_head_dim
    queries = h * n * head if model.q_lora_rank is None else model.q_lora_rank * (h + n * head + 1)
    keys_values = model.kv_lora_rank * (h + n * (model.qk_head_dim + model.v_head_dim) + 1)
    linear = queries + keys_values + h * model.qk_pos_emb_head_dim + n * model.v_head_dim * h
    return 2 * linear + s * n * (head + model.v_head_dim)
