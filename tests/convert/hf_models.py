"""Tiny random models of each family, as transformers builds and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
DEEPSEEK_MOE = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    # The two best of a group score it here, the best topk / topk_group ones in Megatron-Core; as in the released model,
    # they are two.
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
DELTA_NET = {
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
NO_MTP = {"num_nextn_predict_layers": 0}

# name -> model_type and what it changes in COMMON
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "llama3_rope": (
        "llama",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3": ("qwen3", GROUPED),
    "qwen3_moe": ("qwen3_moe", GROUPED | QWEN_MOE),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "glm4_moe",
        GROUPED | DEEPSEEK_MOE | NO_MTP | {"use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
    ),
    "glm4_moe_air": (
        "glm4_moe",
        GROUPED | DEEPSEEK_MOE | NO_MTP | {"attention_bias": True, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT
        | DEEPSEEK_MOE
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("deepseek_v3", LATENT | DEEPSEEK_MOE | NO_MTP),
    # Moonlight: no query latent, no groups, and norms of latents with another epsilon than the others.
    "moonlight": (
        "deepseek_v3",
        LATENT
        | DEEPSEEK_MOE
        | NO_MTP
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "initializer_range": 0.02},
    ),
    "deepseek_v3_yarn": ("deepseek_v3", LATENT | DEEPSEEK_MOE | NO_MTP | YARN),
    "qwen3_next": ("qwen3_next", GROUPED | QWEN_MOE | DELTA_NET),
    # MiMo has no class in transformers; its trunk is Qwen2's, with the same names.
    "mimo": ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": False}),
}


def make(name: str, folder: Path, **changes: Any) -> Any:
    """Builds the model with random weights of which no part is zero or one, and saves it in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = MODELS[name]
    config = AutoConfig.for_model(model_type, **(COMMON | own | changes))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    if name == "mimo":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}))
    return model


@torch.no_grad()
def randomize(model: Any, seed: int = 5) -> None:
    """Weights at which every formula shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if "correction_bias" in n}}
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=generator) * 0.1
        is_norm = "norm" in name and tensor.dim() == 1
        tensor.copy_(drawn + 1 if is_norm else drawn)


def tokens(batch: int = 2, length: int = 12, vocab: int = 100) -> Tensor:
    """Random ids [batch, length]."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[b, s, v] of a transformers model."""
    return model(input_ids=ids, use_cache=False).logits
