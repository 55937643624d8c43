"""The Hugging Face families, one value each in `FAMILIES`: config.json, tensor names and MTP layers. Needs no torch.

Names are those of transformers 5.23 (models/*/configuration_*.py). MiMo has no class there: its file is Qwen2's with
another name and a count of MTP layers (FastMTP's config.json, Tencent-BAC/FastMTP 5875b708).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.names import DEEPSEEK_MTP, MIMO_MTP, QWEN_MTP, SEPARATE_MTP, MTPForm
from megatron_mtp.errors import ConversionError

# Key in config.json -> our field with the same meaning.
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

# Key of every family -> the only supported value, which a missing key means too. transformers lets a top-level
# original_max_position_embeddings win over that of rope_parameters. FastMTP's layers, in MiMo's form but with
# num_speculative_steps, read another hidden state than MiMo's.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "compression_config": None,
    "is_causal": True,
    "original_max_position_embeddings": None,
    "num_speculative_steps": None,
}
DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.02}
OUR_MTP_KEYS = {"mtp_layer_mlp": "mtp_layer_mlp", "mtp_intermediate_size": "mtp_ffn_hidden_size"}
"""As `Family.keys`, where only this project reads the MTP layers (`MTPForm.is_ours`). No released family has a key for
experts in the trunk and none in MTP layers: Step-3.5 lists its layers of experts (moe_layers_enum)."""
DERIVED_HEADS = {"head_dim": None}
"""None: hidden_size / num_attention_heads."""

SIGMOID_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
}
LATENT_NORMS = {"multi_latent_attention": True, "qk_layernorm": True, "latent_norm_epsilon": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type` of config.json, and the tensors in its files."""

    architecture: str
    """The class in `architectures`."""
    keys: dict[str, str]
    """Key of config.json -> our field with the same meaning."""
    ours: dict[str, Any] = field(default_factory=dict)
    """Values of ModelConfig fields that this family fixes, other than our defaults."""
    theirs: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json with a fixed value; other values are refused."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What a missing key means to the class of transformers, besides DEFAULTS; None: it follows from other keys. A key
    that is in neither must be there."""
    renames: dict[str, str] = field(default_factory=dict)
    """Second name of a key -> its first name; the class reads both."""
    dense_layers: Literal["none", "first", "listed"] = "none"
    """Key that names layers without experts: none; first_k_dense_replace; mlp_only_layers."""
    shared_experts: Literal["count", "width"] | None = None
    """Key of the shared experts: n_shared_experts (of the routed width), or shared_expert_intermediate_size."""
    has_routing_groups: bool = False
    """Whether there are keys n_group and topk_group."""
    rotary_percent: float | None = None
    """Default of partial_rotary_factor; None: the class does not read it and rotates the whole head."""
    mtp_key: str = "mtp_num_hidden_layers"
    """Key of the number of MTP layers. Families that were released without any use Qwen3.5's name."""
    mtp_form: MTPForm = SEPARATE_MTP
    """Tensor names of MTP layers; the default is for families that were released without any."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Part of a name in the tables of `names` -> how this family writes it."""
    aliases: tuple[str, ...] = ()
    """Other values of `model_type` with the same files."""

    @property
    def has_experts(self) -> bool:
        """Whether a model of this family has routed experts."""
        return "num_moe_experts" in self.keys.values()

    def name_of(self, name: str) -> str:
        """A name of the tables in `names` as this family writes it."""
        for part, theirs in self.renamed.items():
            name = name.replace(part, theirs)
        return name

    def agrees(self, model: ModelConfig, name: str) -> bool:
        """Whether this family's files can hold the model's value of a field in TELLING."""
        is_read = name in self.keys.values()
        if name == "num_moe_experts":
            return self.has_experts == (model.num_moe_experts is not None)
        return is_read or getattr(model, name) == self.ours.get(name, getattr(ModelConfig(), name))


NO_BIAS = {"attention_bias": False}
FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        keys=COMMON | LATENT | DEEPSEEK_ROUTED,
        ours=LATENT_NORMS | SIGMOID_ROUTER,
        # transformers has no other router in this class; vLLM asks for its names.
        theirs=NO_BIAS
        | {"norm_topk_prob": True, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        defaults={
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
        },
        renames={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        dense_layers="first",
        shared_experts="count",
        has_routing_groups=True,
        mtp_key="num_nextn_predict_layers",
        mtp_form=DEEPSEEK_MTP,
        aliases=("kimi_k2",),
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        keys=COMMON | LATENT | DEEPSEEK_ROUTED,
        ours=LATENT_NORMS | {"moe_router_pre_softmax": True},
        # "group_limited_greedy" takes a group's best expert, Megatron-Core the sum of its best ones.
        theirs=NO_BIAS
        | {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "mlp_bias": False},
        defaults={"routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 0},
        renames={"num_experts": "n_routed_experts"},
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
        defaults=DERIVED_HEADS
        | {
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": False,
            "attention_bias": False,
        },
        renames={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        dense_layers="first",
        shared_experts="count",
        has_routing_groups=True,
        rotary_percent=0.5,
        mtp_key="num_nextn_predict_layers",
        mtp_form=DEEPSEEK_MTP,
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
        defaults=DERIVED_HEADS | {"norm_topk_prob": False, "mlp_only_layers": None},
        renames={"num_local_experts": "num_experts"},
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
        defaults={"mlp_only_layers": None, "layer_types": None, "full_attention_interval": 4}
        | {"shared_expert_intermediate_size": 512},
        dense_layers="listed",
        shared_experts="width",
        rotary_percent=0.25,
        mtp_key="num_nextn_predict_layers",
        mtp_form=QWEN_MTP,
        renamed={"mlp.shared_experts.": "mlp.shared_expert."},
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=COMMON | GROUPED_QUERIES,
        theirs=NO_BIAS | {"mlp_bias": False},
        defaults=DERIVED_HEADS | {"num_key_value_heads": None},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        keys=COMMON
        | GROUPED_QUERIES
        | {"num_local_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"},
        theirs={"sliding_window": None, "router_jitter_noise": 0.0},
        defaults=DERIVED_HEADS,
        renames={"num_experts": "num_local_experts"},
        renamed={
            "mlp.gate.": "block_sparse_moe.gate.",
            "mlp.experts.{e}.gate_proj.": "block_sparse_moe.experts.{e}.w1.",
            "mlp.experts.{e}.down_proj.": "block_sparse_moe.experts.{e}.w2.",
            "mlp.experts.{e}.up_proj.": "block_sparse_moe.experts.{e}.w3.",
        },
    ),
    "mimo": Family(
        architecture="MiMoForCausalLM",
        keys=COMMON | GROUPED_QUERIES,
        # Xiaomi's own vLLM (XiaomiMiMo/vllm 3a353c05, models/mimo.py) takes the final norm out of the trunk and applies
        # it for the head only, so its MTP layer (mimo_mtp.py) reads the hidden state before that norm.
        ours={"add_qkv_bias": True, "mtp_hidden_source": "pre_final_norm"},
        theirs={"attention_bias": True, "use_sliding_window": False},
        defaults=DERIVED_HEADS,
        mtp_key="num_nextn_predict_layers",
        mtp_form=MIMO_MTP,
    ),
}

REFUSED = {
    "nemotron_h": "Mamba layers (Megatron-Core's HybridModel) are not supported; docs/decisions.md, 'Model families'",
}
"""model_type -> why it is not read."""

TELLING = (
    "experimental_attention_variant multi_latent_attention num_moe_experts moe_router_score_function qk_layernorm "
    "add_qkv_bias"
).split()
"""Fields of ModelConfig by which families differ, the most telling first."""
NOT_ARCHITECTURE = frozenset(
    """seq_length make_vocab_size_divisible_by init_method_std attention_dropout hidden_dropout moe_router_dtype
    moe_router_bias_update_rate moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
    moe_token_dispatcher_type moe_grouped_gemm mtp_loss_scaling_factor mtp_depth_weights mtp_use_repeated_layer
    mtp_detach_heads mtp_freeze_trunk tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size pipeline_model_parallel_layout context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size recompute_granularity recompute_method recompute_num_layers
    recompute_modules logits_chunk_tokens logits_z_loss_coeff backend mcore""".split()
)
"""Fields of ModelConfig that config.json need not hold; `mcore` is checked field by field."""
ARCHITECTURE = [field.name for field in fields(ModelConfig) if field.name not in NOT_ARCHITECTURE]
"""Fields of ModelConfig that config.json must hold: all others, so that a new field is not lost silently."""


def find_family(name: str) -> Family:
    """The family of a `model_type`, or of an alias.

    Raises:
        ConversionError: it is unknown, or refused for a reason.
    """
    if name in REFUSED:
        raise ConversionError(f"family {name!r}: {REFUSED[name]}.")
    if canonical(name) not in FAMILIES:
        known = [alias for name, family in FAMILIES.items() for alias in (name, *family.aliases)]
        raise ConversionError(f"family {name!r}: is not known. Known families: {', '.join(known)}.")
    return FAMILIES[canonical(name)]


def canonical(name: str) -> str:
    """The key in FAMILIES of a name or an alias."""
    return next((key for key, family in FAMILIES.items() if name in family.aliases), name)


def family_of(model: ModelConfig) -> str:
    """Name of the family that fits the model best. `hf_config_dict` checks whether it can hold the model."""
    return min(FAMILIES, key=lambda name: [not FAMILIES[name].agrees(model, field) for field in TELLING])
