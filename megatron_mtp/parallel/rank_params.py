"""How many parameters one rank holds, exactly, as Megatron-Core builds it with the torch backend. Pure arithmetic.

`params.py` counts complete models; this file counts a rank's share, with copies of the embedding and replicated norms.
Transformer Engine's modules hold the same, except for the down projections of multi-latent attention, which they do
not shard over TP.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.params import linear_pattern, moe_pattern, padded_vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParameters:
    """Parameters of one rank.

    Args:
        dense: replicated over the dp x cp ranks.
        expert: of routed experts, replicated over the expert data-parallel ranks.
    """

    dense: int
    expert: int = 0

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.expert

    def __add__(self, other: RankParameters) -> RankParameters:
        return RankParameters(dense=self.dense + other.dense, expert=self.expert + other.expert)

    def __mul__(self, count: int) -> RankParameters:
        return RankParameters(dense=self.dense * count, expert=self.expert * count)


def rank_parameters(model: ModelConfig, layout: PipelineLayout, stage: int) -> RankParameters:
    """Parameters on every rank of a pipeline stage; its tensor-, expert- and data-parallel ranks hold equally many.

    Args:
        model: finalized, with a known vocabulary size.
        layout: of this model.
        stage: pipeline rank.

    Source: megatron-core 0.19.2, models/gpt and transformer; compared in tests with ranks that are built.
    """
    chunks = (
        chunk_parameters(model, "".join(layout.chunks[stage][v]), layout.decoder_layers(stage, v))
        for v in range(layout.vp)
    )
    return sum(chunks, RankParameters(dense=0))


def chunk_parameters(model: ModelConfig, symbols: str, layers: range) -> RankParameters:
    """Parameters of one chunk on every rank of its pipeline stage.

    Args:
        symbols: such as "Ettt".
        layers: indices of its decoder layers.
    """
    kinds = Counter(list(zip(moe_pattern(model), linear_pattern(model), strict=True))[layers.start : layers.stop])
    found = RankParameters(dense=_ends(model, symbols))
    for (is_moe, is_linear), count in kinds.items():
        found += layer_rank_parameters(model, is_moe, is_linear=is_linear) * count
    if _has_final_norm(model, symbols, layers):
        found += RankParameters(dense=_norm(model, model.hidden_size))
    copies = Depths.of(model).layers_in(symbols)
    return found + mtp_rank_parameters(model) * copies if copies else found


def layer_rank_parameters(model: ModelConfig, is_moe: bool, *, is_linear: bool = False) -> RankParameters:
    """One decoder layer with its two norms."""
    if is_linear:
        attention = _gated_delta_net(model)
    else:
        attention = _latent_attention(model) if model.multi_latent_attention else _attention(model)
    shell = RankParameters(dense=attention + 2 * _norm(model, model.hidden_size))
    if is_moe:
        return shell + _experts(model)
    tp = model.tensor_model_parallel_size
    return shell + RankParameters(dense=_mlp(model, model.ffn_hidden_size, tp, model.add_bias_linear))


def mtp_rank_parameters(model: ModelConfig) -> RankParameters:
    """One MTP layer with eh_proj [h/tp, 2h]; see `params.mtp_layer_parameters`."""
    h, tp = model.hidden_size, model.tensor_model_parallel_size
    joint = 0 if model.mtp_variant == "parallel" else 2 * _norm(model, h) + 2 * h * h // tp
    return layer_rank_parameters(model, moe_pattern(model)[-1]) + RankParameters(dense=joint + _norm(model, h))


def _ends(model: ModelConfig, symbols: str) -> int:
    """Embedding and head of a chunk.

    MTP layers outside the first chunk need a copy of the embedding. A tied head in the same chunk uses that copy; a
    tied head elsewhere holds one of its own.
    """
    matrix = padded_vocab_size(model) // model.tensor_model_parallel_size * model.hidden_size
    has_embedding = "E" in symbols or "m" in symbols
    count = matrix * has_embedding
    if has_embedding and model.position_embedding_type == "learned_absolute":
        count += model.seq_length * model.hidden_size
    is_shared = model.share_embeddings_and_output_weights and has_embedding
    return count + matrix * ("L" in symbols and not is_shared)


def _has_final_norm(model: ModelConfig, symbols: str, layers: range) -> bool:
    """Without MTP it is in the chunk of the loss, with MTP after the last decoder layer."""
    return model.num_layers - 1 in layers if model.mtp_num_layers else "L" in symbols


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _attention(model: ModelConfig) -> int:
    h, d, tp = model.hidden_size, model.kv_channels, model.tensor_model_parallel_size
    queries = model.num_attention_heads * d
    qkv = queries * (2 if model.attention_output_gate else 1) + 2 * model.num_query_groups * d
    sharded = h * (qkv + queries) + qkv * (model.add_bias_linear or model.add_qkv_bias)
    return sharded // tp + h * model.add_bias_linear + 2 * _norm(model, d) * model.qk_layernorm


def _latent_attention(model: ModelConfig) -> int:
    h, n, rope = model.hidden_size, model.num_attention_heads, model.qk_pos_emb_head_dim
    width, norms = n * (model.qk_head_dim + rope), _norm(model, model.kv_lora_rank) * model.qk_layernorm
    queries = h * width
    if model.q_lora_rank is not None:
        queries = model.q_lora_rank * (h + width)
        norms += _norm(model, model.q_lora_rank) * model.qk_layernorm
    keys_values = h * (model.kv_lora_rank + rope) + model.kv_lora_rank * n * (model.qk_head_dim + model.v_head_dim)
    sharded = queries + keys_values + n * model.v_head_dim * h
    return sharded // model.tensor_model_parallel_size + norms + h * model.add_bias_linear


def _gated_delta_net(model: ModelConfig) -> int:
    """Heads are sharded, the norm of one head's values is not; see `params._gated_delta_net`."""
    heads = model.linear_num_value_heads
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = heads * model.linear_value_head_dim
    projected = 2 * keys + 2 * values + 2 * heads
    convolution = (2 * keys + values) * model.linear_conv_kernel_dim
    sharded = model.hidden_size * (projected + values) + convolution + 2 * heads
    return sharded // model.tensor_model_parallel_size + _norm(model, model.linear_value_head_dim)


def _mlp(model: ModelConfig, width: int, shards: int, has_bias: bool) -> int:
    inner = width * (2 if model.gated_linear_unit else 1)
    return (model.hidden_size * (inner + width) + inner * has_bias) // shards + model.hidden_size * has_bias


def _experts(model: ModelConfig) -> RankParameters:
    tp, etp, h = model.tensor_model_parallel_size, model.expert_tensor_parallel_size, model.hidden_size
    num_experts, width = filled(model.num_moe_experts), filled(model.moe_ffn_hidden_size)
    local = num_experts // model.expert_model_parallel_size
    dense = num_experts * (h + model.add_bias_linear)  # router
    if model.moe_shared_expert_intermediate_size is not None:
        dense += _mlp(model, model.moe_shared_expert_intermediate_size, tp, has_bias=False)
        dense += h * model.moe_shared_expert_gate
    return RankParameters(dense=dense, expert=local * _mlp(model, width, etp, model.add_bias_linear))
