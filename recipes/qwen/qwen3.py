"""Qwen3 dense models with an MTP layer added. Qwen3 was released without any.

They are written to Hugging Face in the form of Qwen3-Next (`mtp.*`), for which loaders exist.
"""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def qwen3_8b_pretrain_config() -> ConfigContainer:
    """Qwen3-8B with one MTP layer: TP=4 with sequence parallelism.

    Sources: dimensions of all sizes, THUDM/slime 624b824a scripts/models/qwen3-*.sh; parallel sizes of all sizes,
    Megatron-Bridge 067f987d recipes/qwen/h100/qwen3.py. Qwen published no learning rate; it is pretrain_common's, and
    the loss factor is Megatron-Core's default.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8)
    model.update(kv_channels=128, qk_layernorm=True, rotary_base=1_000_000.0, layernorm_epsilon=1e-6, vocab_size=151936)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)

    model.update(tensor_model_parallel_size=4, sequence_parallel=True)
    return cfg


def qwen3_600m_pretrain_config() -> ConfigContainer:
    """Qwen3-0.6B with one MTP layer; the head is tied."""
    cfg = _tied(qwen3_8b_pretrain_config())
    cfg.model.update(num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16)
    return cfg


def qwen3_1p7b_pretrain_config() -> ConfigContainer:
    """Qwen3-1.7B with one MTP layer; the head is tied."""
    cfg = qwen3_600m_pretrain_config()
    cfg.model.update(hidden_size=2048, ffn_hidden_size=6144)
    return cfg


def qwen3_4b_pretrain_config() -> ConfigContainer:
    """Qwen3-4B with one MTP layer: TP=2; the head is tied."""
    cfg = _tied(qwen3_8b_pretrain_config())
    cfg.model.update(hidden_size=2560, ffn_hidden_size=9728, tensor_model_parallel_size=2)
    return cfg


def qwen3_14b_pretrain_config() -> ConfigContainer:
    """Qwen3-14B with one MTP layer: TP=8."""
    cfg = qwen3_8b_pretrain_config()
    cfg.model.update(num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40)
    cfg.model.update(tensor_model_parallel_size=8)
    return cfg


def qwen3_32b_pretrain_config() -> ConfigContainer:
    """Qwen3-32B with one MTP layer: TP=8, PP=2, layers recomputed."""
    cfg = qwen3_14b_pretrain_config()
    model = cfg.model
    model.update(num_layers=64, ffn_hidden_size=25600, num_attention_heads=64, pipeline_model_parallel_size=2)
    model.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    cfg.train.micro_batch_size = 1
    return cfg


def _tied(cfg: ConfigContainer) -> ConfigContainer:
    cfg.model.update(share_embeddings_and_output_weights=True, tensor_model_parallel_size=1)
    return cfg
