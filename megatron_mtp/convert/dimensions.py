"""Values of the symbols in the tables of `names`, and which tensors a model has. Pure arithmetic."""

from __future__ import annotations

from megatron_mtp.config.sections import ModelConfig


def sizes(model: ModelConfig) -> dict[str, int]:
    """Symbol in the tables' shapes -> size; `ffn`, the width of a dense block, depends on the layer and is missing."""
    heads, head = model.num_attention_heads, model.kv_channels
    queries = heads * head
    return {
        "1": 1,
        "h": model.hidden_size,
        "head": head,
        "heads": queries,
        "queries": queries * (2 if model.attention_output_gate else 1),
        "keys": model.num_query_groups * head,
        "experts": model.num_moe_experts or 0,
        "expert_ffn": model.moe_ffn_hidden_size or 0,
        "shared_ffn": model.moe_shared_expert_intermediate_size or 0,
        "q_rank": model.q_lora_rank or 0,
        "kv_rank": model.kv_lora_rank,
        "kv_rank+rope": model.kv_lora_rank + model.qk_pos_emb_head_dim,
        "qk_heads": heads * (model.qk_head_dim + model.qk_pos_emb_head_dim),
        "kv_heads": heads * (model.qk_head_dim + model.v_head_dim),
        "v_heads": heads * model.v_head_dim,
        **(_delta_net_sizes(model) if model.experimental_attention_variant is not None else {}),
    }


def _delta_net_sizes(model: ModelConfig) -> dict[str, int]:
    keys, values = model.linear_num_key_heads, model.linear_num_value_heads
    ratio = values // keys
    key_rows, value_rows = keys * model.linear_key_head_dim, values * model.linear_value_head_dim
    return {
        "key_heads": keys,
        "value_heads": values,
        "heads_of_key": ratio,
        "key_width": model.linear_key_head_dim,
        "value_width": model.linear_value_head_dim,
        "values_of_key": ratio * model.linear_value_head_dim,
        "key_rows": key_rows,
        "value_rows": value_rows,
        "qkvz_rows": 2 * (key_rows + value_rows),
        "ba_rows": 2 * values,
        "convolved_rows": 2 * key_rows + value_rows,
        "taps": model.linear_conv_kernel_dim,
    }


def features(model: ModelConfig) -> set[str]:
    """The features of a model on which the existence of tensors depends."""
    shared = model.moe_shared_expert_intermediate_size is not None
    present = {
        "qkv_bias": model.add_qkv_bias,
        "qk_norm": model.qk_layernorm,
        "full_query": model.q_lora_rank is None,
        "query_rank": model.q_lora_rank is not None,
        "query_norm": model.q_lora_rank is not None and model.qk_layernorm,
        "expert_bias": model.moe_router_enable_expert_bias,
        "shared_experts": shared,
        "shared_gate": shared and model.moe_shared_expert_gate,
    }
    return {name for name, is_present in present.items() if is_present}
