"""config.json and ModelConfig carry the same architecture, both ways, and refuse by name what the other side lacks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.convert.hf_config import hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import ARCHITECTURE, FAMILIES, family_of
from megatron_mtp.errors import ConversionError
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit

QWEN_MOE = ["moe_router_score_function=softmax", "moe_router_enable_expert_bias=false"]
PLAIN_MOE = [*QWEN_MOE, "moe_shared_expert_intermediate_size=null"]
NEXT = [
    "layernorm_zero_centered_gamma=true",
    "attention_output_gate=true",
    "experimental_attention_variant=gated_delta_net",
    "linear_attention_freq=4",
    "linear_num_key_heads=2",
    "linear_num_value_heads=4",
    "rotary_percent=0.25",
    "moe_shared_expert_gate=true",
    *QWEN_MOE,
]
YARN = ["rope_type=yarn", "rotary_scaling_factor=4", "mscale=0.707", "mscale_all_dim=0.707"]
CASES = {
    "deepseek_v3": ("tiny_mla_moe", ["moe_router_topk=4"]),
    "deepseek_v3, no groups, no query latent": (
        "tiny_mla_moe",
        [
            "q_lora_rank=null",
            "moe_router_num_groups=null",
            "moe_router_group_topk=null",
            "layernorm_epsilon=1e-5",
            "latent_norm_epsilon=1e-6",
            *YARN,
        ],
    ),
    "deepseek_v2": (
        "tiny_mla_moe",
        [
            *QWEN_MOE,
            "moe_router_pre_softmax=true",
            "moe_router_num_groups=null",
            "moe_router_group_topk=null",
            "mtp_num_layers=0",
            *YARN[:2],
        ],
    ),
    "glm4_moe": ("tiny_moe", ["rotary_percent=0.5", "add_qkv_bias=true", "moe_layer_freq=[0, 1, 1, 1]"]),
    "glm4_moe, whole rotation": ("tiny_moe", ["qk_layernorm=false"]),
    "qwen3": ("tiny_dense", ["share_embeddings_and_output_weights=true"]),
    "qwen3_moe": ("tiny_moe", [*PLAIN_MOE, "moe_layer_freq=[1, 0, 1, 1]"]),
    "qwen3_next": ("tiny_moe", NEXT),
    "llama": ("tiny_dense", ["qk_layernorm=false", "rope_scaling=true", "mtp_num_layers=1"]),
    "mixtral": ("tiny_moe", [*PLAIN_MOE, "qk_layernorm=false", "moe_ffn_hidden_size=null"]),
    "mimo": ("tiny_dense", ["qk_layernorm=false", "add_qkv_bias=true", "rotary_base=640000.0"]),
}


def make(recipe: str, overrides: list[str]) -> ConfigContainer:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, [f"model.{text}" for text in overrides])
    return cfg.finalize()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    """A config, written as JSON and read, gives the same config, and the same finalized architecture."""
    model = make(*CASES[case]).model
    family = case.split(",")[0]
    assert family_of(model) == family
    config = json.loads(json.dumps(hf_config_dict(model)))
    assert config["model_type"] == family
    read = get_recipe("tiny_dense")
    read.model = model_config_from_hf(config)
    read.model.seq_length = model.seq_length
    read.model.moe_aux_loss_coeff = model.moe_aux_loss_coeff
    read.model.moe_router_load_balancing_type = model.moe_router_load_balancing_type
    read = read.finalize().model
    assert hf_config_dict(read) == config
    same = set(ARCHITECTURE) - {"moe_layer_freq", "linear_attention_freq", "latent_norm_epsilon"}
    assert {name: getattr(read, name) for name in same} == {name: getattr(model, name) for name in same}


def test_a_family_with_a_name_of_its_own_needs_one_entry(monkeypatch):
    """An entry in FAMILIES is read and written; a model is never guessed to be of a family that says nothing new."""
    llama = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "plain", replace(llama, architecture="PlainForCausalLM", aliases=("plainer",)))
    model = make(*CASES["llama"]).model
    config = hf_config_dict(model, "plain")
    assert (config["architectures"], config["model_type"]) == (["PlainForCausalLM"], "plain")
    assert model_config_from_hf(config | {"model_type": "plainer"}).hidden_size == model.hidden_size
    assert family_of(model) == "llama"


def test_every_family_is_covered():
    assert {case.split(",")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("case", "override", "named"),
    [
        ("qwen3", "activation_func=gelu", "activation_func = 'gelu'"),
        ("qwen3", "normalization=LayerNorm", "normalization = 'LayerNorm'"),
        ("qwen3", "rotary_percent=0.5", None),
        ("qwen3", "add_bias_linear=true", "add_bias_linear = True"),
        ("qwen3", "mtp_variant=parallel", "mtp_variant = 'parallel'"),
        ("qwen3", "mtp_hidden_source=pre_final_norm", "mtp_hidden_source"),
        ("qwen3_moe", "moe_shared_expert_intermediate_size=64", "moe_shared_expert_intermediate_size = 64"),
        ("deepseek_v3", "moe_layer_freq=[1, 0, 1, 1]", "moe_layer_freq"),
        ("deepseek_v3", "layernorm_epsilon=1e-5", "latent_norm_epsilon = 1e-05"),
        ("deepseek_v3", "moe_shared_expert_intermediate_size=96", "moe_shared_expert_intermediate_size = 96"),
        ("deepseek_v3", "moe_router_topk=2", "num_experts_per_tok = 2 with topk_group = 2"),
        ("deepseek_v2", "mscale=2.0", "mscale = 2.0"),
        ("llama", "mcore.window_size=[4, 0]", "mcore.window_size = .4, 0."),
        ("mixtral", "moe_ffn_hidden_size=64", "moe_ffn_hidden_size = 64"),
        ("glm4_moe", "moe_router_enable_expert_bias=false", "moe_router_enable_expert_bias = False"),
    ],
)
def test_what_a_family_cannot_carry_is_named(case, override, named):
    recipe, overrides = CASES[case]
    model = make(recipe, [*overrides, override]).model
    if named is None:
        assert hf_config_dict(model, case)["rope_parameters"]["partial_rotary_factor"] == 0.5
        return
    with pytest.raises(ConversionError, match=named.replace("'", ".")):
        hf_config_dict(model, case)


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3", {"model_type": "gpt2"}, "gpt2"),
        ("qwen3", {"model_type": "nemotron_h"}, "HybridModel"),
        ("qwen3", {"hidden_size": None, "rope_parameters": {}}, "rope_theta"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "'yarn' is not supported",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}, "rope_parameters": None, "rope_theta": 1e4}, "dynamic"),
        ("deepseek_v3", {"num_experts_per_tok": 6}, "scores each of the 4 groups by its best 3"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "group_limited_greedy"),
    ],
)
def test_what_is_not_built_is_refused_by_its_key(case, change, named):
    config = hf_config_dict(make(*CASES[case]).model) | change
    with pytest.raises(ConversionError, match=named):
        model_config_from_hf(config)


def test_a_missing_key_is_named():
    config = hf_config_dict(make(*CASES["glm4_moe"]).model)
    del config["n_routed_experts"]
    with pytest.raises(ConversionError, match="has no n_routed_experts"):
        model_config_from_hf(config)


def test_the_older_form_on_the_hub_is_read():
    """rope_theta next to rope_scaling, `type` for rope_type, Kimi's own name for DeepSeek's file."""
    config = hf_config_dict(make(*CASES["deepseek_v3, no groups, no query latent"]).model)
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": "kimi_k2",
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {"type": rope.pop("rope_type")} | rope,
    }
    model = model_config_from_hf(config)
    assert (model.rope_type, model.rotary_scaling_factor, model.mscale) == ("yarn", 4.0, 0.707)
    assert model.rotary_base == 10000.0


def test_published_llama3_scaling_is_read_and_other_numbers_are_refused():
    config = hf_config_dict(make(*CASES["llama"]).model)
    assert config["rope_parameters"]["low_freq_factor"] == 1.0
    assert model_config_from_hf(config).rope_scaling_factor == 8.0
    config["rope_parameters"]["high_freq_factor"] = 2.0
    with pytest.raises(ConversionError, match="high_freq_factor"):
        model_config_from_hf(config)
