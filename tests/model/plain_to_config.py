"""The program's config for the plain model's numbers."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.tiny import tiny_dense_pretrain_config
from tests.reference.plain_model import PlainConfig

SEQ_LENGTH = 16


def run_config(
    plain: PlainConfig, micro_batch_size: int, num_microbatches: int, pp: int = 1, documents: bool = False
) -> ConfigContainer:
    """A run whose model is `plain`, on one rank or on `pp` pipeline stages; `documents` are kept apart or not."""
    cfg = tiny_dense_pretrain_config()
    cfg.model.pipeline_model_parallel_size = pp
    for name, value in model_fields(plain).items():
        setattr(cfg.model, name, value)
    cfg.model.seq_length = SEQ_LENGTH
    cfg.dataset.reset_attention_mask = documents
    cfg.train.micro_batch_size = micro_batch_size
    cfg.train.global_batch_size = micro_batch_size * num_microbatches
    cfg.optimizer.clip_grad = 0.0  # gradients are read after the step
    cfg.dist.device = "cpu"
    cfg.dist.num_threads = 1
    return cfg.finalize(world_size=pp)


def model_fields(plain: PlainConfig) -> dict[str, object]:
    """ModelConfig's fields for the plain model's numbers."""
    fields = {
        "num_layers": plain.num_layers,
        "hidden_size": plain.hidden_size,
        "num_attention_heads": plain.num_heads,
        "vocab_size": plain.vocab_size,
        "make_vocab_size_divisible_by": plain.rows_of_embedding,
        "num_query_groups": plain.groups,
        "kv_channels": plain.width_of_head,
        "ffn_hidden_size": plain.ffn_size,
        "position_embedding_type": "rope" if plain.rope_base else "none",
        "rotary_base": plain.rope_base or 10000.0,
        "rotary_percent": plain.rope_percent,
        "normalization": plain.normalization,
        "layernorm_epsilon": plain.eps,
        "layernorm_zero_centered_gamma": plain.zero_centered_gamma,
        "qk_layernorm": plain.qk_norm or (plain.latent is not None and plain.latent.latent_norms),
        "activation_func": plain.activation,
        "gated_linear_unit": plain.gated,
        "share_embeddings_and_output_weights": plain.tied,
        "add_bias_linear": plain.bias,
        "add_qkv_bias": plain.qkv_bias,
        "mtp_num_layers": plain.num_depths,
        "mtp_variant": plain.mtp_variant,
        "mtp_use_repeated_layer": plain.mtp_repeated,
        "mtp_detach_heads": plain.mtp_detach,
        "mtp_freeze_trunk": plain.mtp_freeze_trunk,
        "mtp_hidden_source": plain.mtp_hidden,
        "mtp_loss_scaling_factor": plain.mtp_lambda,
        "mtp_depth_weights": list(plain.mtp_weights) if plain.mtp_weights else None,
        "logits_z_loss_coeff": plain.logits_z_coeff,
        "logits_chunk_tokens": 7,  # an uneven last chunk
    }
    if plain.latent is not None:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        fields |= {"multi_latent_attention": True} | {name: getattr(plain.latent, name) for name in latent}
    if plain.moe is not None:
        fields |= _moe_fields(plain)
    return fields


def _moe_fields(plain: PlainConfig) -> dict[str, object]:
    moe = plain.moe
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(plain.is_moe(layer_idx)) for layer_idx in range(plain.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_topk": moe.topk,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_topk,
        "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1.0 else moe.scaling_factor,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.seq_aux_coeff else "none",
        "moe_aux_loss_coeff": moe.seq_aux_coeff,
        "moe_z_loss_coeff": moe.z_coeff or None,
        "mtp_layer_mlp": None if plain.mtp_ffn_size is None else "dense",
        "mtp_ffn_hidden_size": plain.mtp_ffn_size,
    }
