"""What the model is and how it is split over devices. Names and meanings are Megatron-Core's unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_WIDTH, Derived, knob


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    """Architecture, MTP, parallel sizes, recomputation and backend of one model."""

    SECTION: ClassVar[str] = "model"

    # ---- architecture ----
    num_layers: int = knob(0, ge=1, le=1000, mcore="same")
    """Decoder layers of the trunk, MTP layers not counted."""
    hidden_size: int = knob(0, ge=1, le=MAX_WIDTH, mcore="same")
    """Width h of the residual stream."""
    ffn_hidden_size: Derived[int] = knob(None, ge=1, le=MAX_WIDTH, mcore="same")
    """Width of the dense feed-forward block; None: 4 * hidden_size."""
    num_attention_heads: int = knob(0, ge=1, le=MAX_WIDTH, mcore="same")
    """Query heads."""
    num_query_groups: Derived[int] = knob(None, ge=1, le=MAX_WIDTH, mcore="same")
    """Key/value heads (grouped-query attention); None: num_attention_heads."""
    kv_channels: Derived[int] = knob(None, ge=1, le=MAX_WIDTH, mcore="same")
    """Width of one attention head; None: hidden_size / num_attention_heads."""
    seq_length: int = knob(4096, ge=1, le=2**31, phase="data")
    """Tokens in one sample; dataset.seq_length follows it."""
    vocab_size: int | None = knob(None, ge=1, le=2**31)
    """Token ids are below this; None: taken from the tokenizer."""
    make_vocab_size_divisible_by: int = knob(128, ge=1, le=2**31, resume="free")
    """The embedding is padded to a multiple of this times tensor_model_parallel_size. Padding is in no loss."""
    share_embeddings_and_output_weights: bool = False
    """Tied input embedding and output head."""
    position_embedding_type: Literal["rope", "none", "learned_absolute"] = "rope"
    """Rotary position embedding, or none. learned_absolute cannot be used with MTP."""
    rotary_base: float = knob(10000.0, gt=1, le=1e12, mcore="mla", phase="free")
    """RoPE theta."""
    rotary_percent: float = knob(1.0, ge=0, le=1, mcore="mla")
    """Fraction of each head that RoPE rotates."""
    rope_scaling: bool = knob(False, phase="free")
    """Llama-3.1 frequency scaling."""
    rope_scaling_factor: float = knob(8.0, gt=0, le=1e6, phase="free")
    """Factor of the Llama-3.1 frequency scaling."""
    normalization: Literal["RMSNorm", "LayerNorm"] = knob("RMSNorm", mcore="same")
    """Norm of every block."""
    layernorm_epsilon: float = knob(1e-5, gt=0, le=1, mcore="same")
    """Epsilon of every norm."""
    layernorm_zero_centered_gamma: bool = knob(False, mcore="same")
    """Norm weights are stored as (weight - 1)."""
    add_bias_linear: bool = knob(False, mcore="same")
    """Biases in all linear layers."""
    add_qkv_bias: bool = knob(False, mcore="same")
    """Biases in the query, key and value projections only."""
    gated_linear_unit: bool = knob(True, mcore="same")
    """Gated feed-forward block (SwiGLU with silu)."""
    activation_func: Literal["silu", "gelu", "relu", "squared_relu"] = knob("silu", mcore="own")
    """Activation of the feed-forward block."""
    qk_layernorm: bool = knob(False, mcore="same")
    """Norm of queries and keys per head; with MLA, norm of the latents."""
    attention_output_gate: bool = knob(False, mcore="same")
    """A sigmoid gate on the output of attention, from a query projection of twice the width (Qwen3-Next)."""
    attention_dropout: float = knob(0.0, ge=0, lt=1, mcore="same", resume="curve", phase="free")
    """Dropout on attention probabilities. Above 0 the curve depends on the layout."""
    hidden_dropout: float = knob(0.0, ge=0, lt=1, mcore="same", resume="curve", phase="free")
    """Dropout on block outputs. Above 0 the curve depends on the layout."""
    init_method_std: float = knob(0.02, gt=0, le=100, mcore="same", resume="free")
    """Standard deviation of the initial weights; output projections use it / sqrt(2 * num_layers)."""

    # ---- multi-latent attention ----
    multi_latent_attention: bool = knob(False, mcore="own")
    """DeepSeek's MLA in place of multi-head attention."""
    q_lora_rank: int | None = knob(None, ge=1, le=MAX_WIDTH, mcore="mla")
    """Rank of the query latent; None: full query projection."""
    kv_lora_rank: int = knob(512, ge=1, le=MAX_WIDTH, mcore="mla")
    """Rank of the shared key/value latent."""
    qk_head_dim: int = knob(128, ge=1, le=MAX_WIDTH, mcore="mla")
    """Width of the part of each query/key head that RoPE leaves unchanged."""
    qk_pos_emb_head_dim: int = knob(64, ge=1, le=MAX_WIDTH, mcore="mla")
    """Width of the part of each query/key head that RoPE rotates."""
    v_head_dim: int = knob(128, ge=1, le=MAX_WIDTH, mcore="mla")
    """Width of each value head."""
    rope_type: Literal["rope", "yarn"] = knob("rope", mcore="mla", phase="free")
    """RoPE of MLA; yarn for long context."""
    rotary_scaling_factor: float = knob(40.0, ge=1, le=1e6, mcore="mla", phase="free")
    """YaRN: factor by which the context grows."""
    original_max_position_embeddings: int = knob(4096, ge=1, le=2**31, mcore="mla", phase="free")
    """YaRN: context length before scaling."""
    beta_fast: float = knob(32.0, gt=0, le=1e6, mcore="mla", phase="free")
    """YaRN: rotations over the original context above which a frequency is kept."""
    beta_slow: float = knob(1.0, gt=0, le=1e6, mcore="mla", phase="free")
    """YaRN: rotations over the original context below which a frequency is divided by the factor."""
    mscale: float = knob(1.0, ge=0, le=100, mcore="mla", phase="free")
    """YaRN: coefficient of the scale on the rotary embedding; 0: a scale of 1."""
    mscale_all_dim: float = knob(0.0, ge=0, le=100, mcore="mla", phase="free")
    """YaRN: coefficient of the scale on the softmax, by which the other scale is divided; 0: off."""
    latent_norm_epsilon: float | None = knob(None, gt=0, le=1, mcore="own")
    """Epsilon of the norms of the latents; None: layernorm_epsilon. Hugging Face's DeepSeek classes always use 1e-6."""

    # ---- linear attention ----
    experimental_attention_variant: Literal["gated_delta_net"] | None = knob(None, mcore="same")
    """gated_delta_net: linear attention in some layers (Qwen3-Next). None: attention in all."""
    linear_attention_freq: int | list[int] | None = knob(None, ge=0, le=10_000, mcore="same")
    """Every n-th layer has full attention and the others are linear, or a list of 1 (linear) and 0 (full), one for
    each decoder layer. MTP layers have full attention."""
    linear_conv_kernel_dim: int = knob(4, ge=1, le=10_000, mcore="same")
    """Kernel size, in tokens, of the short convolution over queries, keys and values."""
    linear_key_head_dim: int = knob(128, ge=1, le=MAX_WIDTH, mcore="same")
    """Width of one query and key head of linear attention."""
    linear_value_head_dim: int = knob(128, ge=1, le=MAX_WIDTH, mcore="same")
    """Width of one value head of linear attention."""
    linear_num_key_heads: int = knob(16, ge=1, le=MAX_WIDTH, mcore="same")
    """Query and key heads of linear attention."""
    linear_num_value_heads: int = knob(32, ge=1, le=MAX_WIDTH, mcore="same")
    """Value heads of linear attention."""

    # ---- mixture of experts ----
    num_moe_experts: int | None = knob(None, ge=1, le=100_000, mcore="moe")
    """Routed experts of a MoE layer; None: dense model."""
    moe_layer_freq: int | list[int] = knob(1, ge=0, le=10_000, mcore="moe")
    """Every n-th layer is MoE, or a list of 0 (dense) and 1 (MoE), one for each decoder layer."""
    moe_ffn_hidden_size: int | None = knob(None, ge=1, le=MAX_WIDTH, mcore="moe")
    """Width of one expert; None: ffn_hidden_size."""
    moe_shared_expert_intermediate_size: int | None = knob(None, ge=1, le=MAX_WIDTH, mcore="moe")
    """Total width of the shared experts; None: no shared expert."""
    moe_shared_expert_gate: bool = knob(False, mcore="moe")
    """A sigmoid gate on the shared expert."""
    moe_router_topk: int = knob(2, ge=1, le=100_000, mcore="moe")
    """Experts for each token."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = knob("softmax", mcore="moe")
    """Turns router logits into scores."""
    moe_router_pre_softmax: bool = knob(False, mcore="moe")
    """Softmax before the top-k choice (True) or over the chosen ones (False)."""
    moe_router_num_groups: int | None = knob(None, ge=1, le=100_000, mcore="moe")
    """Groups of experts for group-limited routing."""
    moe_router_group_topk: int | None = knob(None, ge=1, le=100_000, mcore="moe")
    """Groups a token may use."""
    moe_router_topk_scaling_factor: float | None = knob(None, gt=0, le=1e6, mcore="moe")
    """Factor on the routing weights."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = knob("fp32", mcore="moe", resume="curve", phase="free")
    """Dtype of the router's matrix product and scores."""
    moe_router_enable_expert_bias: bool = knob(False, mcore="moe")
    """Auxiliary-loss-free balancing: a bias for each expert, updated from the global counts of a step."""
    moe_router_bias_update_rate: float = knob(1e-3, ge=0, le=100, mcore="moe", resume="curve", phase="free")
    """Step size of that update."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = knob(
        "none", mcore="moe", resume="curve", phase="free"
    )
    """Balancing loss. seq_aux_loss is exact at every layout; aux_loss depends on the micro-batch by definition."""
    moe_aux_loss_coeff: float = knob(0.0, ge=0, le=100, mcore="moe", resume="curve", phase="free")
    """Coefficient of the balancing loss."""
    moe_z_loss_coeff: float | None = knob(None, ge=0, le=100, mcore="moe", resume="curve", phase="free")
    """Coefficient of the router z-loss, a mean over tokens."""
    moe_expert_capacity_factor: float | None = knob(None, gt=0, le=1e6, mcore="moe", resume="curve", phase="free")
    """Tokens above this capacity are dropped, and the curve depends on the layout. None: no token is dropped."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = knob(
        "alltoall", mcore="moe", resume="free", phase="free"
    )
    """How tokens are sent to their experts. flex (DeepEP, HybridEP) is not supported; refused by name."""
    moe_grouped_gemm: bool | None = knob(None, mcore="own", resume="free", phase="free")
    """One grouped matrix product for all local experts. None: with Transformer Engine, and with the torch backend on a
    GPU where widths are multiples of 8."""

    # ---- multi-token prediction ----
    mtp_num_layers: Derived[int] = knob(None, ge=0, le=1000, mcore="own", resume="curve", phase="free")
    """D, the number of prediction depths in addition to the next token; 0 or None: no MTP. A resume with more adds
    layers by mtp_new_layers_init, one with fewer drops the last ones; everything else goes on."""
    mtp_new_layers_init: Literal["fresh", "last_layer", "last_depth"] | None = knob(None, resume="free", phase="free")
    """How MTP layers start that the checkpoint lacks. fresh: as in a new model. last_layer: transformer layer and final
    norm are copies of the trunk's last ones; input norms, projection and a feed-forward block of mtp_layer_mlp are
    fresh. last_depth: a copy of the checkpoint's last MTP layer. None: a checkpoint with fewer layers is refused."""
    mtp_loss_scaling_factor: float | str = knob(0.1, ge=0, le=100, resume="curve", phase="free")
    """lambda in total = main + lambda / D * sum_k w_k L_k. A number, steps in tokens ("0.3@0,0.1@10T"), or
    "linear:0.3->0.1@10T"."""
    mtp_depth_weights: list[float] | None = knob(None, ge=0, le=1e6, resume="curve", phase="free")
    """w_k for each depth; None: all 1."""
    mtp_variant: str = "sequential"
    """sequential: depth k reads depth k-1 and the token k ahead (DeepSeek-V3). parallel: every depth reads the
    trunk (Gloeckle et al. 2024), and is recomputed in the backward pass if there are several. module:NAME: a variant of
    your own (docs/extending.md)."""
    mtp_layer_mlp: Literal["dense"] | None = None
    """Feed-forward block of the MTP layers in a model of experts. dense: a dense one, which costs less (Step-3.5).
    None: as in the trunk's last layer."""
    mtp_ffn_hidden_size: int | None = knob(None, ge=1, le=MAX_WIDTH)
    """Width of that block with mtp_layer_mlp = dense; None: ffn_hidden_size."""
    mtp_use_repeated_layer: bool = knob(False, mcore="same", resume="curve")
    """One set of MTP weights applied D times (Nemotron-3)."""
    mtp_detach_heads: bool = knob(False, mcore="same", resume="curve", phase="free")
    """MTP losses do not reach the trunk, the embedding and the head."""
    mtp_freeze_trunk: bool = knob(False, resume="curve")
    """Train the MTP layers only; trunk, embedding and head are frozen."""
    mtp_hidden_source: Literal["post_final_norm", "pre_final_norm"] = "post_final_norm"
    """The hidden state that depth 1 reads: after the final norm (DeepSeek-V3 and most) or before it (Step-3.5; then
    the MTP layers share a chunk with the last decoder layer)."""

    # ---- parallel sizes ----
    tensor_model_parallel_size: int = knob(1, ge=1, le=100_000, mcore="same", resume="free", phase="free")
    """TP."""
    sequence_parallel: bool = knob(False, mcore="same", resume="free", phase="free")
    """Shards norms and residuals along the sequence over TP; has no effect at TP = 1."""
    pipeline_model_parallel_size: int = knob(1, ge=1, le=1000, mcore="same", resume="free", phase="free")
    """PP, the number of stages."""
    virtual_pipeline_model_parallel_size: Derived[int] = knob(
        None, ge=1, le=1000, mcore="own", resume="free", phase="free"
    )
    """VP, model chunks for each stage (interleaved schedule); None: 1."""
    pipeline_model_parallel_layout: Derived[str | list[int]] = knob(
        "auto", ge=0, le=10_000, mcore="own", resume="free", phase="free"
    )
    """Which layers each chunk holds: "auto" (the planner's), "even", Megatron's string ("Et*3|(tt|)*29m|L"), or
    decoder layers of each chunk ([5, 6, 6, 4])."""
    context_parallel_size: int = knob(1, ge=1, le=100_000, mcore="same", resume="free", phase="free")
    """CP, shards the sequence."""
    expert_model_parallel_size: int = knob(1, ge=1, le=100_000, mcore="same", resume="free", phase="free")
    """EP, shards the experts."""
    expert_tensor_parallel_size: Derived[int] = knob(None, ge=1, le=100_000, mcore="same", resume="free", phase="free")
    """ETP, tensor parallel size inside an expert; None: TP."""

    # ---- memory ----
    recompute_granularity: Literal["full", "selective"] | None = knob(None, mcore="same", resume="free", phase="free")
    """Recompute complete layers (full) or chosen modules (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = knob(None, mcore="same", resume="free", phase="free")
    """full: groups of recompute_num_layers layers (uniform), or the first recompute_num_layers of each chunk
    (block); MTP layers in both."""
    recompute_num_layers: int | None = knob(None, ge=1, le=1000, mcore="same", resume="free", phase="free")
    """See recompute_method."""
    recompute_modules: list[str] | None = knob(None, mcore="same", resume="free", phase="free")
    """selective: core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, shared_experts; None: core_attn."""
    logits_chunk_tokens: int | None = knob(None, ge=1, le=2**31, resume="free", phase="free")
    """Cross entropy is computed in chunks of this many tokens of one rank, so the full logits never exist. None: 64 to
    1024, at most as many as take a quarter of the memory of a micro-batch's logits in fp32."""
    logits_z_loss_coeff: float = knob(0.0, ge=0, le=100, resume="curve", phase="free")
    """Coefficient of log(Z)^2 of the main and MTP logits; 0: off."""

    # ---- implementation ----
    backend: Literal["auto", "torch", "transformer_engine"] = knob("auto", mcore="own", resume="free", phase="free")
    """Which modules the model is built from. auto: Transformer Engine where it imports, a GPU is present and
    attention does not stop at documents; else torch."""
    mcore: dict[str, Any] = knob({}, mcore="own")
    """Fields of Megatron-Core's TransformerConfig that have no field here, by name; checked against the pinned
    release."""
