"""Which models decoding computes: an allow-list of config fields. A field that is on no list is refused."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from megatron_mtp.config.checks.model import MTP_VARIANTS
from megatron_mtp.config.mcore.effects import changed_function
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import UnsupportedError

COMPUTED = frozenset(
    """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels seq_length vocab_size
    make_vocab_size_divisible_by share_embeddings_and_output_weights position_embedding_type rotary_base rotary_percent
    rope_scaling rope_scaling_factor normalization layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear
    add_qkv_bias gated_linear_unit activation_func qk_layernorm multi_latent_attention q_lora_rank kv_lora_rank
    qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_scaling_factor original_max_position_embeddings
    beta_fast beta_slow mscale mscale_all_dim latent_norm_epsilon num_moe_experts moe_layer_freq moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_score_function
    moe_router_pre_softmax moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor moe_router_dtype
    moe_router_enable_expert_bias mtp_num_layers mtp_variant mtp_use_repeated_layer mtp_hidden_source
    mtp_layer_mlp mtp_ffn_hidden_size""".split()
)
"""Fields of ModelConfig that decoding follows."""
WITHOUT_EFFECT = frozenset(
    """init_method_std attention_dropout hidden_dropout moe_router_bias_update_rate moe_router_load_balancing_type
    moe_aux_loss_coeff moe_z_loss_coeff moe_expert_capacity_factor mtp_loss_scaling_factor mtp_depth_weights
    mtp_detach_heads mtp_freeze_trunk mtp_new_layers_init logits_chunk_tokens logits_z_loss_coeff
    tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    pipeline_model_parallel_layout context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    moe_token_dispatcher_type moe_grouped_gemm recompute_granularity recompute_method recompute_num_layers
    recompute_modules backend linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
    linear_num_key_heads linear_num_value_heads mcore""".split()
)
"""Fields that matter in training only, or together with a refused one. `mcore` is checked field by field."""
REFUSED = {
    "attention_output_gate": "decoding does not compute gated attention. Export the model and use transformers.",
    "experimental_attention_variant": "decoding has no linear attention. Export the model and use transformers.",
}
"""Fields that decoding supports at their default only, and why."""


def refuse_unsupported(model: ModelConfig) -> None:
    """Raises UnsupportedError for a model that decoding might compute wrongly, with all problems at once."""
    unknown = "it is not known whether this changes what the model computes. Leave the field at its default."
    problems = []
    if model.position_embedding_type == "learned_absolute":
        problems.append("model.position_embedding_type = learned_absolute: decoding supports rope and none only.")
    if model.mtp_num_layers and model.mtp_variant not in MTP_VARIANTS:
        problems.append(f"model.mtp_variant = {model.mtp_variant!r}: decoding computes sequential and parallel only.")
    for field in fields(model):
        value = getattr(model, field.name)
        if field.name not in COMPUTED | WITHOUT_EFFECT and value != _default(field):
            problems.append(f"model.{field.name} = {value!r}: {REFUSED.get(field.name, unknown)}")
    problems += [f"model.mcore.{name} = {value!r}: {unknown}" for name, value in changed_function(model).items()]
    if problems:
        raise UnsupportedError(problems)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
