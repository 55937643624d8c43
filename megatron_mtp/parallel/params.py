"""How many parameters a model has, counted as Megatron-Core builds it with our backends. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig


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
        return self.embedding + self.trunk_active + self.output + self.mtp_active

    @property
    def main_active(self) -> int:
        """Active parameters without the MTP layers."""
        return self.active - self.mtp_active


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of a finalized model config; its vocabulary size must be known.

    Source: megatron-core 0.19.2, models/gpt and transformer; compared in tests with models that are built.
    """
    rows = padded_vocab_size(model)
    embedding = rows * model.hidden_size
    if model.position_embedding_type == "learned_absolute":
        embedding += model.seq_length * model.hidden_size
    kinds = list(zip(moe_pattern(model), linear_pattern(model), strict=True))
    norm = _norm(model, model.hidden_size)
    trunk = sum(layer_parameters(model, is_moe, is_linear=linear) for is_moe, linear in kinds) + norm
    active = sum(layer_parameters(model, moe, is_linear=linear, only_active=True) for moe, linear in kinds) + norm
    copies = Depths.of(model).distinct
    return ParameterCount(
        embedding=embedding,
        trunk=trunk,
        trunk_active=active,
        output=0 if model.share_embeddings_and_output_weights else rows * model.hidden_size,
        mtp=copies * mtp_layer_parameters(model),
        mtp_active=copies * mtp_layer_parameters(model, only_active=True),
    )


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding over all tensor parallel ranks: a multiple of make_vocab_size_divisible_by x TP."""
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return -(-(model.vocab_size or 0) // multiple) * multiple


def moe_pattern(model: ModelConfig) -> list[bool]:
    """For each decoder layer, whether it has experts. An MTP layer has them if the last decoder layer has."""
    if model.num_moe_experts is None:
        return [False] * model.num_layers
    if isinstance(model.moe_layer_freq, int):
        return [idx % model.moe_layer_freq == 0 for idx in range(model.num_layers)]
    return [bool(kind) for kind in model.moe_layer_freq]


def linear_pattern(model: ModelConfig) -> list[bool]:
    """For each decoder layer, whether its attention is linear. An MTP layer has full attention."""
    if model.experimental_attention_variant is None:
        return [False] * model.num_layers
    if isinstance(model.linear_attention_freq, int):
        return [(idx + 1) % model.linear_attention_freq != 0 for idx in range(model.num_layers)]
    return [bool(kind) for kind in model.linear_attention_freq or []]


def layer_parameters(model: ModelConfig, is_moe: bool, *, is_linear: bool = False, only_active: bool = False) -> int:
    """One decoder layer with its two norms."""
    if is_linear:
        attention = _gated_delta_net(model)
    else:
        attention = _latent_attention(model) if model.multi_latent_attention else _attention(model)
    block = _experts(model, only_active) if is_moe else _mlp(model, model.ffn_hidden_size, model.add_bias_linear)
    return attention + block + 2 * _norm(model, model.hidden_size)


def mtp_layer_parameters(model: ModelConfig, *, only_active: bool = False) -> int:
    """One MTP layer: enorm, hnorm, eh_proj [h, 2h] without bias, a transformer layer, final norm.

    A layer of the parallel variant reads the trunk only and has no enorm, hnorm and eh_proj.
    """
    h = model.hidden_size
    joint = 0 if model.mtp_variant == "parallel" else 2 * _norm(model, h) + 2 * h * h
    return joint + layer_parameters(model, moe_pattern(model)[-1], only_active=only_active) + _norm(model, h)


def _norm(model: ModelConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _attention(model: ModelConfig) -> int:
    h, d, groups = model.hidden_size, model.kv_channels, model.num_query_groups
    queries = model.num_attention_heads * d
    qkv = queries * (2 if model.attention_output_gate else 1) + 2 * groups * d
    biases = qkv * (model.add_bias_linear or model.add_qkv_bias) + h * model.add_bias_linear
    return h * qkv + queries * h + biases + 2 * _norm(model, d) * model.qk_layernorm


def _latent_attention(model: ModelConfig) -> int:
    """Only the output projection can have a bias; qk_layernorm norms the latents."""
    h, n, rope = model.hidden_size, model.num_attention_heads, model.qk_pos_emb_head_dim
    width = n * (model.qk_head_dim + rope)
    queries = h * width
    if model.q_lora_rank is not None:
        queries = model.q_lora_rank * (h + width) + _norm(model, model.q_lora_rank) * model.qk_layernorm
    keys_values = h * (model.kv_lora_rank + rope) + model.kv_lora_rank * n * (model.qk_head_dim + model.v_head_dim)
    keys_values += _norm(model, model.kv_lora_rank) * model.qk_layernorm
    return queries + keys_values + n * model.v_head_dim * h + h * model.add_bias_linear


def _gated_delta_net(model: ModelConfig) -> int:
    """Projections of queries, keys, values, gate, beta and alpha; convolution; A and dt of each head; norm; output."""
    heads = model.linear_num_value_heads
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = heads * model.linear_value_head_dim
    projected = 2 * keys + 2 * values + 2 * heads
    convolution = (2 * keys + values) * model.linear_conv_kernel_dim
    return (
        model.hidden_size * (projected + values) + convolution + 2 * heads + _norm(model, model.linear_value_head_dim)
    )


def _mlp(model: ModelConfig, width: int, has_bias: bool) -> int:
    inner = width * (2 if model.gated_linear_unit else 1)
    return model.hidden_size * (inner + width) + (inner + model.hidden_size) * has_bias


def _experts(model: ModelConfig, only_active: bool) -> int:
    num_experts = filled(model.num_moe_experts)
    num_used = model.moe_router_topk if only_active else num_experts
    count = num_used * _mlp(model, filled(model.moe_ffn_hidden_size), model.add_bias_linear)
    count += num_experts * (model.hidden_size + model.add_bias_linear)  # router
    if model.moe_shared_expert_intermediate_size is not None:
        count += _mlp(model, model.moe_shared_expert_intermediate_size, has_bias=False)
        count += model.hidden_size * model.moe_shared_expert_gate
    return count
