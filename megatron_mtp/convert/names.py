"""Where each tensor of ours lies in each family's files: tables, as data. Imports neither torch nor megatron.

Our names are keys of Megatron-Core's sharded state dict, as checkpoints hold them, behind the prefix of a layer. Theirs are
names in safetensors files, behind the prefix of their layer. Shapes are theirs, in symbols that `dimensions.sizes` resolves.

Sources: transformers 5.23 models/*/modeling_*.py and conversion_mapping.py; of MTP names, Megatron-Bridge 067f987d
models/{deepseek,glm,mimo,qwen}, vllm 0.33 model_executor/models/*_mtp.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["copy", "stacked", "by_group", "by_group_gated", "swap_halves", "part"]
"""How a tensor of ours is made of theirs.

copy: it is theirs. stacked: their rows, one tensor after the other. by_group: query, key and value rows, in turn for each
key/value head. by_group_gated: the same, where their query rows are query and gate in turn for each head, and ours first all
queries of a group, then all its gates. swap_halves: the two halves of the columns change places. part: some rows of theirs.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor of theirs that lies as `groups` equal blocks, each cut into `widths` rows: the cut number `index`."""

    groups: str
    widths: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a layer.

    Args:
        ours: key behind our layer prefix.
        theirs: names behind their layer prefix; {e} is the expert.
        shapes: of theirs.
        layout: see `Layout`.
        needs: the tensor exists if the model has this feature; see `dimensions.features`.
        part: of layout `part`.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    layout: Layout = "copy"
    needs: str | None = None
    part: Part | None = None


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
# Rotary channels are interleaved in these files, and so Megatron-Core reads them under multi-latent attention.
LATENT_ATTENTION = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), ("h",)),
    Row("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), ("qk_heads h",), needs="whole_query"),
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


def _delta_net_part(ours: str, theirs: str, shape: str, part: Part) -> Row:
    return Row(f"self_attention.{ours}", (f"linear_attn.{theirs}.weight",), (shape,), "part", part=part)


# Both projections of the files lie key head by key head; the convolution as query, key, value.
DELTA_NET = (
    Row("self_attention.in_proj.layer_norm_weight", ("input_layernorm.weight",), ("h",)),
    *(
        _delta_net_part(f"in_proj.weight.{name}", "in_proj_qkvz", "qkvz_rows h", Part("key_heads", _QKVZ, index))
        for index, name in enumerate(("query", "key", "value", "z"))
    ),
    *(
        _delta_net_part(f"in_proj.weight.{name}", "in_proj_ba", "ba_rows h", Part("key_heads", _BA, index))
        for index, name in enumerate(("beta", "alpha"))
    ),
    *(
        _delta_net_part(f"conv1d.weight.{name}", "conv1d", "convolved_rows 1 taps", Part("1", _CONVOLUTION, index))
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

# A family that writes a part of a name differently.
RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {
        "mlp.gate.": "block_sparse_moe.gate.",
        "mlp.experts.{e}.gate_proj.": "block_sparse_moe.experts.{e}.w1.",
        "mlp.experts.{e}.down_proj.": "block_sparse_moe.experts.{e}.w2.",
        "mlp.experts.{e}.up_proj.": "block_sparse_moe.experts.{e}.w3.",
    },
    "qwen3_next": {"mlp.shared_experts.": "mlp.shared_expert."},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MTPForm:
    """How a family writes its MTP layers. {n} counts layers on from the trunk's, {k} depths from 0.

    Args:
        prefix: of the names below.
        block_prefix: of the transformer layer.
        max_depths: depths with weights of their own; None: any number.
        projection_layout: swap_halves where their projection reads the hidden state first, and ours the embedding.
        duplicates: copies of embedding and head that released files hold beside each depth, and what each repeats.
    """

    prefix: str
    block_prefix: str
    enorm: str
    hnorm: str
    projection: str
    norm: str
    max_depths: int | None = None
    projection_layout: Layout = "copy"
    duplicates: tuple[tuple[str, str], ...] = ()


MTP_FORMS = {
    "deepseek": MTPForm(
        prefix="model.layers.{n}.",
        block_prefix="model.layers.{n}.",
        enorm="enorm.weight",
        hnorm="hnorm.weight",
        projection="eh_proj.weight",
        norm="shared_head.norm.weight",
        duplicates=(("embed_tokens.weight", EMBEDDING), ("shared_head.head.weight", HEAD)),
    ),
    # One projection and one set of norms for the whole file, so one depth.
    "qwen": MTPForm(
        prefix="mtp.",
        block_prefix="mtp.layers.{k}.",
        enorm="pre_fc_norm_embedding.weight",
        hnorm="pre_fc_norm_hidden.weight",
        projection="fc.weight",
        norm="norm.weight",
        max_depths=1,
    ),
    "mimo": MTPForm(
        prefix="model.mtp_layers.{k}.",
        block_prefix="model.mtp_layers.{k}.",
        enorm="token_layernorm.weight",
        hnorm="hidden_layernorm.weight",
        projection="input_proj.weight",
        norm="final_layernorm.weight",
        projection_layout="swap_halves",
    ),
}
# Families that were released without MTP layers take the Qwen form, which nothing else in their files can collide with.
MTP_FORM_OF = {"deepseek_v3": "deepseek", "glm4_moe": "deepseek", "mimo": "mimo"}

# Buffers that old files hold and every loader computes anew.
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)


def mtp_form(family: str) -> MTPForm:
    """The form of a family's MTP layers."""
    return MTP_FORMS[MTP_FORM_OF.get(family, "qwen")]


def their_name(family: str, name: str) -> str:
    """A name of the tables above as `family` writes it."""
    for part, theirs in RENAMED.get(family, {}).items():
        name = name.replace(part, theirs)
    return name
