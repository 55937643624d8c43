"""The numbers that fix a plain model. No parallel sizes: the plain model knows of none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    """Width of the part of a query or key head that RoPE does not turn."""
    qk_pos_emb_head_dim: int
    """Width of the part that RoPE turns; the key's is shared by all heads."""
    v_head_dim: int
    latent_norms: bool = True


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A feed-forward block of routed experts, with or without a shared one."""

    num_experts: int
    topk: int
    ffn_size: int
    shared_ffn_size: int | None = None
    shared_gate: bool = False
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    pre_softmax: bool = False
    """softmax over all experts before the choice (True), or over the chosen ones (False)."""
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float = 1.0
    expert_bias: bool = False
    """A bias for each expert that takes part in the choice only, never in the weights."""
    bias_update_rate: float = 1e-3
    seq_aux_coeff: float = 0.0
    z_coeff: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Architecture and objective of a plain model. Names are the mathematics' own, not Megatron's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    """Ids that can occur. Rows of the embedding and the head above it are padding: they never take part in a loss."""
    padded_vocab_size: int | None = None
    num_groups: int | None = None
    """Key/value heads; None: num_heads."""
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    ffn_size: int = 0
    rope_base: float | None = 10000.0
    """None: no positions at all."""
    rope_percent: float = 1.0
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    eps: float = 1e-5
    zero_centered_gamma: bool = False
    """Norms multiply by (1 + weight)."""
    qk_norm: bool = False
    activation: Literal["silu", "gelu", "relu", "squared_relu"] = "silu"
    gated: bool = True
    tied: bool = False
    bias: bool = False
    """Biases in every linear map, but for the head, the MTP projection, and the latent maps of MLA, which have none."""
    qkv_bias: bool = False
    latent: LatentConfig | None = None
    moe: MoEConfig | None = None
    moe_layers: tuple[bool, ...] | None = None
    """Which trunk layers are MoE; None: all, if `moe` is given. MTP blocks are of the last trunk layer's kind, unless
    `mtp_ffn_size` is given."""

    num_depths: int = 0
    """D."""
    mtp_variant: Literal["sequential", "parallel"] = "sequential"
    mtp_ffn_size: int | None = None
    """MTP blocks have a dense feed-forward block of this width in a model with `moe`."""
    mtp_repeated: bool = False
    """One set of MTP weights for all depths."""
    mtp_detach: bool = False
    """MTP losses do not reach the trunk, the embedding and the head."""
    mtp_freeze_trunk: bool = False
    """Only MTP weights have a gradient."""
    mtp_hidden: Literal["post_final_norm", "pre_final_norm"] = "post_final_norm"
    mtp_lambda: float = 0.1
    mtp_weights: tuple[float, ...] | None = None
    """w_k; None: all 1."""
    logits_z_coeff: float = 0.0

    @property
    def groups(self) -> int:
        return self.num_groups or self.num_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rows_of_embedding(self) -> int:
        return self.padded_vocab_size or self.vocab_size

    @property
    def depth_weights(self) -> tuple[float, ...]:
        """Factor of L_0, L_1 .. L_D in the total: 1, then lambda / D * w_k."""
        weights = self.mtp_weights or (1.0,) * self.num_depths
        assert len(weights) == self.num_depths
        return (1.0, *(self.mtp_lambda / self.num_depths * w for w in weights))

    def is_moe(self, layer_idx: int) -> bool:
        """Kind of a trunk layer."""
        return self.moe is not None and (self.moe_layers is None or self.moe_layers[layer_idx])
