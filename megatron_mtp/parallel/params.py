"""How many parameters a model and each of its ranks have, as Megatron-Core builds them. Pure arithmetic.

The counts are those of the torch backend. Transformer Engine's modules hold the same, except for the down projections
of multi-latent attention, which they do not shard over TP.

Source: megatron-core 0.19.2, models/gpt and transformer; compared in tests with models and ranks that are built.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.parallel.layout import PipelineLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of one complete model: every shared tensor counts once, padding of the vocabulary is included.

    Active parameters are those that one token uses: of the routed experts only the chosen ones. The expert bias of
    auxiliary-loss-free balancing is a buffer and is not counted.
    """

    embedding: int
    trunk: int
    """Decoder layers and the final norm."""
    trunk_active: int
    output: int
    """The output head; 0 when it is tied to the embedding."""
    mtp: int
    """All MTP layers: norms, projections, transformer layers. They share embedding and head."""
    mtp_active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.main + self.mtp

    @property
    def main(self) -> int:
        """The model without its MTP layers: the number that is usually published."""
        return self.embedding + self.trunk + self.output

    @property
    def active(self) -> int:
        """Active parameters, MTP layers included."""
        return self.main_active + self.mtp_active

    @property
    def main_active(self) -> int:
        """Active parameters without the MTP layers."""
        return self.embedding + self.trunk_active + self.output


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


class Shards(NamedTuple):
    """Parts that a layer is cut into: dense matrices, the set of experts, one expert. By default it is complete."""

    tp: int = 1
    ep: int = 1
    etp: int = 1

    @classmethod
    def of(cls, model: ModelConfig) -> Shards:
        """The parts of a finalized model."""
        tp, ep = model.tensor_model_parallel_size, model.expert_model_parallel_size
        return cls(tp, ep, model.expert_tensor_parallel_size)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of a finalized model config; its vocabulary size must be known."""
    complete = Shards()
    norm = RankParameters(dense=_norm(model, model.hidden_size))
    trunk = _layers(model, range(model.num_layers), complete) + norm
    mtp = mtp_layer_parameters(model, complete) * Depths.of(model).distinct
    matrix = padded_vocab_size(model) * model.hidden_size

    def active(held: RankParameters) -> int:
        if not model.num_moe_experts:
            return held.total
        return held.dense + held.expert // model.num_moe_experts * model.moe_router_topk

    return ParameterCount(
        embedding=matrix + _positions(model),
        trunk=trunk.total,
        trunk_active=active(trunk),
        output=0 if model.share_embeddings_and_output_weights else matrix,
        mtp=mtp.total,
        mtp_active=active(mtp),
    )


def rank_parameters(model: ModelConfig, layout: PipelineLayout, stage: int) -> RankParameters:
    """Parameters on every rank of a pipeline stage; its tensor-, expert- and data-parallel ranks hold equally many.

    Args:
        model: finalized, with a known vocabulary size.
        layout: of this model.
        stage: pipeline rank.
    """
    chunks = enumerate(layout.chunks[stage])
    held = (chunk_parameters(model, "".join(chunk), layout.decoder_layers(stage, v)) for v, chunk in chunks)
    return sum(held, RankParameters(dense=0))


def chunk_parameters(model: ModelConfig, symbols: str, layers: range) -> RankParameters:
    """Parameters of one chunk on every rank of its pipeline stage.

    Args:
        symbols: such as "Ettt".
        layers: indices of its decoder layers.
    """
    shards = Shards.of(model)
    found = _layers(model, layers, shards) + RankParameters(dense=_ends(model, symbols, shards.tp))
    # Without MTP the final norm is in the chunk of the loss, with MTP after the last decoder layer.
    if model.num_layers - 1 in layers if model.mtp_num_layers else "L" in symbols:
        found += RankParameters(dense=_norm(model, model.hidden_size))
    copies = Depths.of(model).layers_in(symbols)
    return found + mtp_layer_parameters(model, shards) * copies if copies else found


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding over all tensor parallel ranks: a multiple of make_vocab_size_divisible_by x TP.

    0 while the size of the vocabulary is not known.
    """
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return -(-(model.vocab_size or 0) // multiple) * multiple


def moe_pattern(model: ModelConfig) -> list[bool]:
    """For each decoder layer, whether it has experts; of MTP layers, see `mtp_dense_width`."""
    if model.num_moe_experts is None:
        return [False] * model.num_layers
    if isinstance(model.moe_layer_freq, int):
        return [idx % model.moe_layer_freq == 0 for idx in range(model.num_layers)]
    return [bool(kind) for kind in model.moe_layer_freq]


def mtp_dense_width(model: ModelConfig) -> int | None:
    """Width of the dense feed-forward block of MTP layers; None: they have experts.

    They are of the last decoder layer's kind, unless model.mtp_layer_mlp = "dense".
    """
    if model.mtp_layer_mlp == "dense":
        return model.mtp_ffn_hidden_size
    return None if moe_pattern(model)[-1] else model.ffn_hidden_size


def linear_pattern(model: ModelConfig) -> list[bool]:
    """For each decoder layer, whether its attention is linear. An MTP layer has full attention."""
    if model.experimental_attention_variant is None:
        return [False] * model.num_layers
    if isinstance(model.linear_attention_freq, int):
        return [(idx + 1) % model.linear_attention_freq != 0 for idx in range(model.num_layers)]
    return [bool(kind) for kind in model.linear_attention_freq or []]


def layer_parameters(
    model: ModelConfig, shards: Shards, is_moe: bool, *, is_linear: bool = False, dense_width: int | None = None
) -> RankParameters:
    """One transformer layer with its two norms.

    Args:
        dense_width: width of its feed-forward block without experts; None: ffn_hidden_size.
    """
    if is_linear:
        attention = _gated_delta_net(model, shards.tp)
    else:
        attention = (_latent_attention if model.multi_latent_attention else _attention)(model, shards.tp)
    shell = RankParameters(dense=attention + 2 * _norm(model, model.hidden_size))
    if is_moe:
        return shell + _experts(model, shards)
    width = model.ffn_hidden_size if dense_width is None else dense_width
    return shell + RankParameters(dense=_mlp(model, width, shards.tp, model.add_bias_linear))


def mtp_layer_parameters(model: ModelConfig, shards: Shards) -> RankParameters:
    """One MTP layer: enorm, hnorm, eh_proj [h/tp, 2h] without bias, a transformer layer, final norm.

    A layer of the parallel variant reads the trunk only and has no enorm, hnorm and eh_proj.
    """
    h = model.hidden_size
    joint = 0 if model.mtp_variant == "parallel" else 2 * _norm(model, h) + 2 * h * h // shards.tp
    width = mtp_dense_width(model)
    layer = layer_parameters(model, shards, width is None, dense_width=width)
    return layer + RankParameters(dense=joint + _norm(model, h))


def _layers(model: ModelConfig, layers: range, shards: Shards) -> RankParameters:
    kinds = list(zip(moe_pattern(model), linear_pattern(model), strict=True))[layers.start : layers.stop]
    held = (
        layer_parameters(model, shards, is_moe, is_linear=is_linear) * count
        for (is_moe, is_linear), count in Counter(kinds).items()
    )
    return sum(held, RankParameters(dense=0))


def _ends(model: ModelConfig, symbols: str, tp: int) -> int:
    """Embedding and head of a chunk.

    MTP layers outside the first chunk need a copy of the embedding. A tied head in the same chunk uses that copy; a
    tied head elsewhere holds one of its own.
    """
    matrix = padded_vocab_size(model) // tp * model.hidden_size
    has_embedding = "E" in symbols or "m" in symbols
    has_head = "L" in symbols and not (model.share_embeddings_and_output_weights and has_embedding)
    return (matrix + _positions(model)) * has_embedding + matrix * has_head


def _positions(model: ModelConfig) -> int:
    """Learned position embeddings."""
    return model.seq_length * model.hidden_size * (model.position_embedding_type == "learned_absolute")


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _attention(model: ModelConfig, tp: int) -> int:
    h, d = model.hidden_size, model.kv_channels
    queries = model.num_attention_heads * d
    qkv = queries * (2 if model.attention_output_gate else 1) + 2 * model.num_query_groups * d
    sharded = h * (qkv + queries) + qkv * (model.add_bias_linear or model.add_qkv_bias)
    return sharded // tp + h * model.add_bias_linear + 2 * _norm(model, d) * model.qk_layernorm


def _latent_attention(model: ModelConfig, tp: int) -> int:
    """Only the output projection can have a bias; qk_layernorm norms the latents."""
    h, n, rope = model.hidden_size, model.num_attention_heads, model.qk_pos_emb_head_dim
    width, norms = n * (model.qk_head_dim + rope), _norm(model, model.kv_lora_rank) * model.qk_layernorm
    queries = h * width
    if model.q_lora_rank is not None:
        queries = model.q_lora_rank * (h + width)
        norms += _norm(model, model.q_lora_rank) * model.qk_layernorm
    keys_values = h * (model.kv_lora_rank + rope) + model.kv_lora_rank * n * (model.qk_head_dim + model.v_head_dim)
    sharded = queries + keys_values + n * model.v_head_dim * h
    return sharded // tp + norms + h * model.add_bias_linear


def _gated_delta_net(model: ModelConfig, tp: int) -> int:
    """Projections of queries, keys, values, gate, beta and alpha; convolution; A and dt of each head; norm; output.

    Heads are sharded, the norm of one head's values is not.
    """
    heads = model.linear_num_value_heads
    keys, values = model.linear_num_key_heads * model.linear_key_head_dim, heads * model.linear_value_head_dim
    projected = 2 * keys + 2 * values + 2 * heads
    convolution = (2 * keys + values) * model.linear_conv_kernel_dim
    sharded = model.hidden_size * (projected + values) + convolution + 2 * heads
    return sharded // tp + _norm(model, model.linear_value_head_dim)


def _mlp(model: ModelConfig, width: int, shards: int, has_bias: bool) -> int:
    inner = width * (2 if model.gated_linear_unit else 1)
    return (model.hidden_size * (inner + width) + inner * has_bias) // shards + model.hidden_size * has_bias


def _experts(model: ModelConfig, shards: Shards) -> RankParameters:
    """Router, routed experts and the shared expert."""
    num_experts, width = filled(model.num_moe_experts), filled(model.moe_ffn_hidden_size)
    dense = num_experts * (model.hidden_size + model.add_bias_linear)
    if model.moe_shared_expert_intermediate_size is not None:
        dense += _mlp(model, model.moe_shared_expert_intermediate_size, shards.tp, has_bias=False)
        dense += model.hidden_size * model.moe_shared_expert_gate
    expert = num_experts // shards.ep * _mlp(model, width, shards.etp, model.add_bias_linear)
    return RankParameters(dense=dense, expert=expert)
