"""config.json and ModelConfig carry the same architecture, both ways, and refuse by name what the other side lacks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.convert.hf_config import hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import ARCHITECTURE, DEFAULTS, FAMILIES, FIXED, family_of
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
    "qwen3_moe, dense depths": ("tiny_moe", [*PLAIN_MOE, "mtp_layer_mlp=dense", "mtp_ffn_hidden_size=80"]),
    "qwen3_next": ("tiny_moe", NEXT),
    "llama": ("tiny_dense", ["qk_layernorm=false", "rope_scaling=true", "mtp_num_layers=1"]),
    "mixtral": ("tiny_moe", [*PLAIN_MOE, "qk_layernorm=false", "moe_ffn_hidden_size=null"]),
    "mimo": (
        "tiny_dense",
        ["qk_layernorm=false", "add_qkv_bias=true", "rotary_base=640000.0", "mtp_hidden_source=pre_final_norm"],
    ),
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
        ("qwen3", "rotary_percent=0.5", "rotary_percent = 0.5"),
        ("deepseek_v3", "rotary_percent=0.5", "rotary_percent = 0.5"),
        ("qwen3", "add_bias_linear=true", "add_bias_linear = True"),
        ("qwen3", "mtp_variant=parallel", "mtp_variant = 'parallel'"),
        ("qwen3", "mtp_hidden_source=pre_final_norm", "mtp_hidden_source"),
        ("qwen3_moe", "moe_shared_expert_intermediate_size=64", "moe_shared_expert_intermediate_size = 64"),
        ("deepseek_v3", "moe_layer_freq=[1, 0, 1, 1]", "moe_layer_freq"),
        ("deepseek_v3", "layernorm_epsilon=1e-5", "latent_norm_epsilon = 1e-05"),
        ("deepseek_v3", "moe_shared_expert_intermediate_size=96", "moe_shared_expert_intermediate_size = 96"),
        ("deepseek_v3", "moe_router_topk=2", "num_experts_per_tok = 2 with topk_group = 2"),
        ("deepseek_v3", "mtp_layer_mlp=dense", "mtp_layer_mlp = 'dense'"),
        ("qwen3_next", "mtp_layer_mlp=dense", "mtp_layer_mlp = 'dense'"),
        ("deepseek_v2", "mscale=2.0", "mscale = 2.0"),
        ("llama", "mcore.window_size=[4, 0]", "mcore.window_size = .4, 0."),
        ("llama", "mtp_hidden_source=pre_final_norm", "mtp_hidden_source = 'pre_final_norm'"),
        ("mimo", "mtp_hidden_source=post_final_norm", "mtp_hidden_source = 'post_final_norm'"),
        ("mixtral", "moe_ffn_hidden_size=64", "moe_ffn_hidden_size = 64"),
        ("glm4_moe", "moe_router_enable_expert_bias=false", "moe_router_enable_expert_bias = False"),
    ],
)
def test_what_a_family_cannot_carry_is_named(case, override, named):
    recipe, overrides = CASES[case]
    model = make(recipe, [*overrides, override]).model
    with pytest.raises(ConversionError, match=named.replace("'", ".")):
        hf_config_dict(model, case)


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'"),
        ("qwen3", {"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3", {"model_type": "gpt2"}, "gpt2"),
        ("qwen3", {"model_type": "nemotron_h"}, "HybridModel"),
        ("qwen3", {"rope_theta": None, "rope_parameters": {}}, "rope_theta"),
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


ROPE = {"rope_theta": None, "rope_scaling": None}  # the older form of positions, switched off
YARN_KEYS = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3_KEYS = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
ABSENT = object()


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("glm4_moe", {"n_routed_experts": ABSENT}, "has no n_routed_experts"),
        ("qwen3_moe", {"norm_topk_prob": ABSENT}, "has no norm_topk_prob, which .* takes for False"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob is null"),
        ("qwen3", {"head_dim": ABSENT}, "has no head_dim"),
        ("qwen3", {"head_dim": None}, "head_dim is null"),
        ("qwen3", {"is_causal": False}, "is_causal = False"),
        ("qwen3", {"is_causal": None}, "is_causal = None"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types has 'sliding_attention'"),
        ("deepseek_v3", {"q_lora_rank": ABSENT}, "has no q_lora_rank"),
        ("deepseek_v3", {"n_group": None}, "n_group is null"),
        ("deepseek_v3", {"num_local_experts": 3}, "n_routed_experts = 8 and num_local_experts = 3"),
        ("deepseek_v3", {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "num_experts_per_tok = 1"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("glm4_moe", {"partial_rotary_factor": None, "rope_parameters": ROPE}, "partial_rotary_factor = None"),
        *((case, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5") for case in ("llama", "qwen3", "mimo")),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ("mimo", {"num_speculative_steps": 3}, "num_speculative_steps = 3"),
        ("deepseek_v3", ROPE | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn: has no factor"),
        ("llama", ROPE | {"rope_parameters": LLAMA3_KEYS}, "llama3: has no high_freq_factor"),
        ("deepseek_v3", ROPE | {"rope_parameters": YARN_KEYS | {"mscale": 0.7}}, "mscale = 0.7 with .* = None"),
        ("deepseek_v3", ROPE | {"rope_parameters": YARN_KEYS | {"mscale_all_dim": 0.7}}, "mscale = None with .* = 0.7"),
        ("deepseek_v3", ROPE | {"rope_parameters": YARN_KEYS | {"mscale": 0, "mscale_all_dim": 1}}, "mscale = 0 with"),
        ("deepseek_v3", {"rope_scaling": YARN_KEYS}, "rope_scaling = .* beside rope_parameters"),
        ("qwen3", {"rope_theta": 1e6}, "rope_theta = 10000.0 beside 1000000.0"),
        ("llama", {"rope_scaling": LLAMA3_KEYS | {"type": "linear"}}, "two descriptions that differ"),
    ],
)
def test_what_transformers_reads_otherwise_is_refused(case, change, named):
    """Missing and null keys, keys that its class ignores, and two descriptions of one thing."""
    values = hf_config_dict(make(*CASES[case]).model) | change
    config = {key: value for key, value in values.items() if value is not ABSENT}
    with pytest.raises(ConversionError, match=f"(?s){named}"):
        model_config_from_hf(config)


def test_missing_keys_mean_what_transformers_means():
    config = hf_config_dict(make(*CASES["deepseek_v3"]).model)
    for key in ("routed_scaling_factor", "n_group", "topk_group"):
        del config[key]
    model = model_config_from_hf(config | {"num_experts_per_tok": 8})
    assert (model.moe_router_topk_scaling_factor, model.moe_router_num_groups, model.moe_router_group_topk) == (
        2.5,
        8,
        4,
    )


CLASSES = {"mimo": "qwen2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_class(name):
    """Writing what a missing key means changes nothing in transformers' config."""
    from transformers import AutoConfig

    form, model_type = FAMILIES[name], CLASSES.get(name, name)
    without = AutoConfig.for_model(model_type).to_dict()
    for key, value in (DEFAULTS | FIXED | form.theirs | form.defaults).items():
        explicit = AutoConfig.for_model(model_type, **{key: value}).to_dict()
        declared = {k: v for k, v in explicit.items() if k in without or k != key}
        assert declared == without, key
    percent = {} if form.rotary_percent is None else {"partial_rotary_factor": form.rotary_percent}
    assert AutoConfig.for_model(model_type, **percent).to_dict()["rope_parameters"] == without["rope_parameters"]


def test_positions_are_written_for_transformers_4_too():
    """It reads rope_theta, rope_scaling and partial_rotary_factor, and knows no rope_parameters."""
    llama = hf_config_dict(make(*CASES["llama"]).model)
    assert llama["rope_theta"] == 10000.0
    assert llama["rope_scaling"]["rope_type"] == "llama3"
    assert llama["rope_scaling"]["factor"] == 8.0
    assert "partial_rotary_factor" not in llama
    assert hf_config_dict(make(*CASES["qwen3_next"]).model)["partial_rotary_factor"] == 0.25
    yarn = hf_config_dict(make(*CASES["deepseek_v3, no groups, no query latent"]).model)["rope_scaling"]
    assert (yarn["rope_type"], yarn["factor"], yarn["mscale"]) == ("yarn", 4.0, 0.707)


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_mla_moe", "tiny_qwen3_next"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_holds_or_names(recipe, family):
    """A model of one kind in files of another: a config that reads back, or one message."""
    model = make(recipe, ["moe_router_topk=4"] if recipe == "tiny_mla_moe" else []).model
    message = ""
    try:
        config = hf_config_dict(model, family)
    except ConversionError as error:
        message = str(error)
    if message:
        assert re.search(r"model\.\w+ = ", message), message
    else:
        assert model_config_from_hf(config).num_moe_experts == model.num_moe_experts


def test_one_expert_per_token_is_not_exported_from_a_sigmoid_router():
    model = make("tiny_moe", ["moe_router_topk=1", "rotary_percent=0.5", "add_qkv_bias=true"]).model
    with pytest.raises(ConversionError, match="num_experts_per_tok = 1: Megatron-Core weights"):
        hf_config_dict(model, "glm4_moe")


def test_the_older_form_on_the_hub_is_read():
    """rope_theta next to rope_scaling, `type` for rope_type, Kimi's own name for DeepSeek's file."""
    config = hf_config_dict(make(*CASES["deepseek_v3, no groups, no query latent"]).model)
    del config["rope_parameters"]
    config["model_type"] = "kimi_k2"
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    model = model_config_from_hf(config)
    assert (model.rope_type, model.rotary_scaling_factor, model.mscale) == ("yarn", 4.0, 0.707)
    assert model.rotary_base == 10000.0


def test_published_llama3_scaling_is_read_and_other_numbers_are_refused():
    config = hf_config_dict(make(*CASES["llama"]).model)
    assert config["rope_parameters"]["low_freq_factor"] == 1.0
    assert model_config_from_hf(config).rope_scaling_factor == 8.0
    config["rope_parameters"]["high_freq_factor"] = config["rope_scaling"]["high_freq_factor"] = 2.0
    with pytest.raises(ConversionError, match="high_freq_factor"):
        model_config_from_hf(config)
