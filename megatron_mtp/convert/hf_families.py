"""How each Hugging Face family writes its architecture in config.json, as data. Imports neither torch nor megatron.

Names are those of transformers 5.23 (models/*/configuration_*.py). MiMo has no class there: its file is Qwen2's, with another
name and a count of MTP layers (FastMTP's config.json, Tencent-BAC/FastMTP 5875b708).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# key in config.json -> our field of the same meaning
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "initializer_range": "init_method_std",
}
GROUPED_QUERIES = {"num_key_value_heads": "num_query_groups", "head_dim": "kv_channels"}
LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
DELTA_NET = {
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
}
ROUTED = {"num_experts_per_tok": "moe_router_topk", "moe_intermediate_size": "moe_ffn_hidden_size"}
DEEPSEEK_ROUTED = ROUTED | {"n_routed_experts": "num_moe_experts"}
QWEN_ROUTED = ROUTED | {"num_experts": "num_moe_experts"}

# Files on the hub leave these out; transformers then means the value given here.
DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.02, "q_lora_rank": None}

SIGMOID_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
}
LATENT_NORMS = {"multi_latent_attention": True, "qk_layernorm": True, "latent_norm_epsilon": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type` of config.json."""

    architecture: str
    """The class in `architectures`."""
    keys: dict[str, str]
    ours: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that are always so in this family, where that is not our default."""
    theirs: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that are written so, and refused with another value."""
    dense_layers: Literal["none", "first", "listed"] = "none"
    """How layers without experts are named: there is no choice; first_k_dense_replace; mlp_only_layers."""
    shared_experts: Literal["count", "width"] | None = None
    """n_shared_experts of the routed width, or shared_expert_intermediate_size."""
    has_routing_groups: bool = False
    """n_group and topk_group."""
    rotary_percent: float = 1.0
    """Where config.json does not say."""
    mtp_key: str = "mtp_num_hidden_layers"
    """The count of MTP layers. Families that were released without any take Qwen3.5's name."""


NO_BIAS = {"attention_bias": False}
FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        keys=COMMON | LATENT | DEEPSEEK_ROUTED,
        ours=LATENT_NORMS | SIGMOID_ROUTER,
        # transformers has no other router in this class; vLLM asks for its names.
        theirs=NO_BIAS
        | {"norm_topk_prob": True, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        dense_layers="first",
        shared_experts="count",
        has_routing_groups=True,
        mtp_key="num_nextn_predict_layers",
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        keys=COMMON | LATENT | DEEPSEEK_ROUTED,
        ours=LATENT_NORMS | {"moe_router_pre_softmax": True},
        # "group_limited_greedy" takes a group's best expert, Megatron-Core the sum of its best ones.
        theirs=NO_BIAS
        | {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "mlp_bias": False},
        dense_layers="first",
        shared_experts="count",
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        keys=COMMON
        | GROUPED_QUERIES
        | DEEPSEEK_ROUTED
        | {"use_qk_norm": "qk_layernorm", "attention_bias": "add_qkv_bias"},
        ours=SIGMOID_ROUTER,
        theirs={"norm_topk_prob": True},
        dense_layers="first",
        shared_experts="count",
        has_routing_groups=True,
        rotary_percent=0.5,
        mtp_key="num_nextn_predict_layers",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=COMMON | GROUPED_QUERIES,
        ours={"qk_layernorm": True},
        theirs=NO_BIAS | {"use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=COMMON | GROUPED_QUERIES | QWEN_ROUTED,
        ours={"qk_layernorm": True},
        theirs=NO_BIAS | {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
        dense_layers="listed",
    ),
    "qwen3_next": Family(
        architecture="Qwen3NextForCausalLM",
        keys=COMMON | GROUPED_QUERIES | QWEN_ROUTED | DELTA_NET,
        ours={
            "qk_layernorm": True,
            "layernorm_zero_centered_gamma": True,
            "attention_output_gate": True,
            "experimental_attention_variant": "gated_delta_net",
            "moe_shared_expert_gate": True,
        },
        theirs=NO_BIAS | {"norm_topk_prob": True, "decoder_sparse_step": 1},
        dense_layers="listed",
        shared_experts="width",
        rotary_percent=0.25,
        mtp_key="num_nextn_predict_layers",
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=COMMON | GROUPED_QUERIES,
        theirs=NO_BIAS | {"mlp_bias": False},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        keys=COMMON
        | GROUPED_QUERIES
        | {"num_local_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"},
        theirs={"sliding_window": None, "router_jitter_noise": 0.0},
    ),
    "mimo": Family(
        architecture="MiMoForCausalLM",
        keys=COMMON | GROUPED_QUERIES,
        ours={"add_qkv_bias": True},
        theirs={"attention_bias": True, "use_sliding_window": False},
        mtp_key="num_nextn_predict_layers",
    ),
}

# Other names of the same file.
ALIASES = {"kimi_k2": "deepseek_v3"}

# model_type -> why it is not read
REFUSED = {
    "nemotron_h": "Mamba layers and Megatron-Core's HybridModel are not built here (docs/decisions.md, 'Model families')",
}

# What a family's file fixes. Sizes of a run, training settings and MTP's objective are not among them.
ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "share_embeddings_and_output_weights position_embedding_type rotary_base rotary_percent rope_scaling "
    "rope_scaling_factor normalization layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias "
    "gated_linear_unit activation_func qk_layernorm attention_output_gate multi_latent_attention q_lora_rank "
    "kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_scaling_factor "
    "original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim latent_norm_epsilon "
    "experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim "
    "linear_value_head_dim linear_num_key_heads linear_num_value_heads num_moe_experts moe_layer_freq "
    "moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk "
    "moe_router_score_function moe_router_pre_softmax moe_router_num_groups moe_router_group_topk "
    "moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_expert_capacity_factor mtp_num_layers mtp_variant "
    "mtp_hidden_source"
).split()
