"""The models of the matrix: four layers, two depths, all losses weighted so that a mistake in any of them shows."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.tiny import (
    tiny_dense_pretrain_config,
    tiny_mla_moe_pretrain_config,
    tiny_moe_pretrain_config,
    tiny_qwen3_next_pretrain_config,
)
from megatron_mtp.verify.batches import BatchSpec

NUM_SAMPLES = 8
MICRO_BATCH_SIZE = 2


def dense() -> ConfigContainer:
    """Grouped-query attention with norms of queries and keys."""
    return _small(tiny_dense_pretrain_config())


def moe() -> ConfigContainer:
    """Softmax router over 8 experts, shared expert, router z-loss, sequence-wise balancing loss."""
    cfg = _small_experts(tiny_moe_pretrain_config())
    cfg.model.moe_router_score_function = "softmax"
    cfg.model.moe_router_enable_expert_bias = False
    cfg.model.moe_z_loss_coeff = 0.01
    cfg.model.moe_router_load_balancing_type = "seq_aux_loss"
    cfg.model.moe_aux_loss_coeff = 0.05
    return cfg


def dense_depths() -> ConfigContainer:
    """Experts in the trunk, a dense feed-forward block of its own width in the MTP layers."""
    cfg = moe()
    cfg.model.update(mtp_layer_mlp="dense", mtp_ffn_hidden_size=40)
    return cfg


def mla_moe() -> ConfigContainer:
    """DeepSeek-V3 in miniature: latent attention with norms of the latents, first layer dense, expert bias, groups."""
    cfg = _small_experts(tiny_mla_moe_pretrain_config())
    cfg.model.kv_channels = None
    cfg.model.q_lora_rank = 12
    cfg.model.kv_lora_rank = 8
    cfg.model.qk_head_dim = 8
    cfg.model.qk_pos_emb_head_dim = 4
    cfg.model.v_head_dim = 6
    cfg.model.moe_aux_loss_coeff = 0.05
    return cfg


def qwen3_next() -> ConfigContainer:
    """Three layers of linear attention, one of gated attention, experts with a gated shared one, one depth."""
    cfg = _small_experts(tiny_qwen3_next_pretrain_config())
    cfg.model.update(moe_aux_loss_coeff=0.05, mtp_depth_weights=[1.0])
    cfg.model.update(linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=8, linear_value_head_dim=6)
    return cfg


def _small(cfg: ConfigContainer) -> ConfigContainer:
    model = cfg.model
    model.hidden_size = 32
    model.ffn_hidden_size = 48
    model.kv_channels = 8
    model.seq_length = 32
    model.vocab_size = 101
    model.make_vocab_size_divisible_by = 8  # 104 rows at tp 1, 112 at tp 2
    model.init_method_std = 0.1
    model.mtp_loss_scaling_factor = 1.0
    model.mtp_depth_weights = [1.0, 0.5]
    model.logits_chunk_tokens = 7  # an uneven last chunk
    cfg.optimizer.lr = 2e-3
    cfg.train.global_batch_size = NUM_SAMPLES
    cfg.train.micro_batch_size = MICRO_BATCH_SIZE
    cfg.dataset.mock = True
    cfg.dist.device = "cpu"
    cfg.dist.num_threads = 1
    return cfg


def _small_experts(cfg: ConfigContainer) -> ConfigContainer:
    _small(cfg)
    cfg.model.moe_ffn_hidden_size = 16
    cfg.model.moe_shared_expert_intermediate_size = 24
    return cfg


MODELS: dict[str, Callable[[], ConfigContainer]] = {
    "dense": dense,
    "moe": moe,
    "dense_depths": dense_depths,
    "mla_moe": mla_moe,
    "qwen3_next": qwen3_next,
}


def batch_spec(cfg: ConfigContainer, mask: str) -> BatchSpec:
    """Batches for a model of this file."""
    return BatchSpec(
        num_samples=cfg.train.global_batch_size,
        seq_length=cfg.model.seq_length,
        vocab_size=cfg.model.vocab_size,
        num_depths=cfg.model.mtp_num_layers,
        mask=mask,
        micro_batch_size=MICRO_BATCH_SIZE,
    )
