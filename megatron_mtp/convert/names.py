"""Tables of tensor names: ours, those in Hugging Face files, and how one is made of the other. Needs no torch.

Our names are keys of Megatron-Core's sharded state dict, as in checkpoints, after the prefix of a layer. Theirs are
names in safetensors files, after the prefix of their layer. Shapes are theirs, in symbols that `dimensions.sizes`
resolves.

Sources: transformers 5.23 models/*/modeling_*.py and conversion_mapping.py; of MTP names, Megatron-Bridge 067f987d
models/{deepseek,glm,mimo,qwen}, vllm 0.33 model_executor/models/*_mtp.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arrangement = Literal["copy", "stacked", "by_group", "by_group_gated", "swap_halves", "part"]
"""How a tensor of ours is made of theirs.

copy: unchanged. stacked: their rows, one tensor after the other. by_group: for each key/value head its query, key and
value rows. by_group_gated: the same; their query rows alternate between query and gate for each head, ours hold all
queries of a group before all its gates. swap_halves: the two halves of the columns are swapped. part: some of their
rows.
"""


@dataclass(frozen=True, slots=True)
class RowCut:
    """Some rows of a tensor with `groups` equal blocks, each cut into `widths` rows: cut number `index` of each."""

    groups: str
    widths: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a layer.

    Args:
        ours: key after our layer prefix.
        theirs: names after their layer prefix; {e} is the expert.
        shapes: shapes of `theirs`.
        arrangement: see `Arrangement`.
        needs: the tensor exists if the model has this feature; see `dimensions.features`. None: always.
        cut: which rows, for arrangement `part`.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    arrangement: Arrangement = "copy"
    needs: str | None = None
    cut: RowCut | None = None


QKV = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
GROUPED_ATTENTION = (
    Row("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), ("h",)),
    Row(
        "self_attention.linear_qkv.weight",
        tuple(f"{name}weight" for name in QKV),
        ("queries h", "keys h", "keys h"),
        "by_group",
    ),
    Row(
        "self_attention.linear_qkv.bias",
        tuple(f"{name}bias" for name in QKV),
        ("queries", "keys", "keys"),
        "by_group",
        "qkv_bias",
    ),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("h heads",)),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), ("head",), needs="qk_norm"),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), ("head",), needs="qk_norm"),
)
# Rotary channels are interleaved in these files, as Megatron-Core expects with multi-latent attention.
LATENT_ATTENTION = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), ("h",)),
    Row("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), ("qk_heads h",), needs="full_query"),
    Row("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",), ("q_rank h",), needs="query_rank"),
    Row(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        ("self_attn.q_a_layernorm.weight",),
        ("q_rank",),
        needs="query_norm",
    ),
    Row(
        "self_attention.linear_q_up_proj.weight",
        ("self_attn.q_b_proj.weight",),
        ("qk_heads q_rank",),
        needs="query_rank",
    ),
    Row("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",), ("kv_rank+rope h",)),
    Row(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        ("self_attn.kv_a_layernorm.weight",),
        ("kv_rank",),
        needs="qk_norm",
    ),
    Row("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",), ("kv_heads kv_rank",)),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("h v_heads",)),
)
_QKVZ = ("key_width", "key_width", "values_of_key", "values_of_key")
_BA = ("heads_of_key", "heads_of_key")
_CONVOLUTION = ("key_rows", "key_rows", "value_rows")


def _delta_net_row(ours: str, theirs: str, shape: str, cut: RowCut) -> Row:
    return Row(f"self_attention.{ours}", (f"linear_attn.{theirs}.weight",), (shape,), "part", cut=cut)


# Both projections in the files are ordered by key head, the convolution by query, key, value.
DELTA_NET = (
    Row("self_attention.in_proj.layer_norm_weight", ("input_layernorm.weight",), ("h",)),
    *(
        _delta_net_row(f"in_proj.weight.{name}", "in_proj_qkvz", "qkvz_rows h", RowCut("key_heads", _QKVZ, index))
        for index, name in enumerate(("query", "key", "value", "z"))
    ),
    *(
        _delta_net_row(f"in_proj.weight.{name}", "in_proj_ba", "ba_rows h", RowCut("key_heads", _BA, index))
        for index, name in enumerate(("beta", "alpha"))
    ),
    *(
        _delta_net_row(f"conv1d.weight.{name}", "conv1d", "convolved_rows 1 taps", RowCut("1", _CONVOLUTION, index))
        for index, name in enumerate(("query", "key", "value"))
    ),
    Row("self_attention.dt_bias", ("linear_attn.dt_bias",), ("value_heads",)),
    Row("self_attention.A_log", ("linear_attn.A_log",), ("value_heads",)),
    Row("self_attention.out_norm.weight", ("linear_attn.norm.weight",), ("value_width",)),
    Row("self_attention.out_proj.weight", ("linear_attn.out_proj.weight",), ("h value_rows",)),
)
DENSE = (
    Row("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), ("h",)),
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("ffn h", "ffn h"), "stacked"),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ("h ffn",)),
)
EXPERTS = (
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), ("h",)),
    Row("mlp.router.weight", ("mlp.gate.weight",), ("experts h",)),
    Row("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), ("experts",), needs="expert_bias"),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ("expert_ffn h", "expert_ffn h"),
        "stacked",
    ),
    Row("mlp.experts.experts.linear_fc2.weight", ("mlp.experts.{e}.down_proj.weight",), ("h expert_ffn",)),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("shared_ffn h", "shared_ffn h"),
        "stacked",
        "shared_experts",
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        ("mlp.shared_experts.down_proj.weight",),
        ("h shared_ffn",),
        needs="shared_experts",
    ),
    Row(
        "mlp.shared_experts.gate_weight",
        ("mlp.shared_expert_gate.weight",),
        ("1 h",),
        needs="shared_gate",
    ),
)
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class MTPForm:
    """Names of MTP layers in a family's files. {n} continues the trunk's layer numbers, {k} counts depths from 0.

    Args:
        prefix: prefix of the names below.
        block_prefix: prefix of the transformer layer.
        max_depths: most depths with weights of their own; None: any number.
        projection_arrangement: swap_halves if their projection reads the hidden state first; ours reads the embedding
            first.
        duplicates: copies of embedding and head that released files hold for each depth, and what each repeats.
        folder: subfolder that holds the MTP tensors; None: they are among the trunk's.
    """

    prefix: str
    block_prefix: str
    enorm: str
    hnorm: str
    projection: str
    norm: str
    max_depths: int | None = None
    projection_arrangement: Arrangement = "copy"
    duplicates: tuple[tuple[str, str], ...] = ()
    folder: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether only this project reads it, so that config.json may describe MTP layers with keys of its own."""
        return self.folder is not None


DEEPSEEK_MTP = MTPForm(
    prefix="model.layers.{n}.",
    block_prefix="model.layers.{n}.",
    enorm="enorm.weight",
    hnorm="hnorm.weight",
    projection="eh_proj.weight",
    norm="shared_head.norm.weight",
    duplicates=(("embed_tokens.weight", EMBEDDING), ("shared_head.head.weight", HEAD)),
)
# One projection and one set of norms per file, so one depth.
QWEN_MTP = MTPForm(
    prefix="mtp.",
    block_prefix="mtp.layers.{k}.",
    enorm="pre_fc_norm_embedding.weight",
    hnorm="pre_fc_norm_hidden.weight",
    projection="fc.weight",
    norm="norm.weight",
    max_depths=1,
)
MIMO_MTP = MTPForm(
    prefix="model.mtp_layers.{k}.",
    block_prefix="model.mtp_layers.{k}.",
    enorm="token_layernorm.weight",
    hnorm="hidden_layernorm.weight",
    projection="input_proj.weight",
    norm="final_layernorm.weight",
    projection_arrangement="swap_halves",
)
# For families that were released without MTP layers. vLLM's classes of these families refuse a tensor that they do not
# know (AutoWeightsLoader), and read every safetensors file of the folder, but none of its subfolders
# (model_loader/default_loader.py); transformers and SGLang read no subfolder either.
SEPARATE_MTP = MTPForm(
    prefix="mtp.layers.{k}.",
    block_prefix="mtp.layers.{k}.",
    enorm="enorm.weight",
    hnorm="hnorm.weight",
    projection="eh_proj.weight",
    norm="norm.weight",
    folder="mtp",
)
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Buffers in old files, which every loader recomputes."""
