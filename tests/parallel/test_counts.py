"""Parameters equal models that are built, operations equal Megatron's formula, peaks are dense and never guessed."""

from __future__ import annotations

import types

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.config.peaks import dense_peak_tflops
from megatron_mtp.parallel.flops import train_flops_per_token
from megatron_mtp.parallel.params import count_parameters, padded_vocab_size
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit

LINEAR = ["model.experimental_attention_variant=gated_delta_net", "model.linear_num_key_heads=2"]
VARIANTS = [
    ("tiny_dense", []),
    ("tiny_dense", ["model.mtp_num_layers=0"]),
    ("tiny_dense", ["model.share_embeddings_and_output_weights=true", "model.vocab_size=500"]),
    ("tiny_dense", ["model.add_bias_linear=true", "model.normalization=LayerNorm", "model.qk_layernorm=false"]),
    ("tiny_dense", ["model.add_qkv_bias=true", "model.gated_linear_unit=false", "model.activation_func=gelu"]),
    ("tiny_dense", ["model.mtp_use_repeated_layer=true", "model.kv_channels=24"]),
    ("tiny_dense", ["model.mtp_variant=parallel", "model.mtp_num_layers=3"]),
    ("tiny_dense", ["model.attention_output_gate=true", "model.add_qkv_bias=true"]),
    ("tiny_dense", [*LINEAR, "model.linear_attention_freq=4"]),
    ("tiny_moe", [*LINEAR, "model.linear_attention_freq=[1, 0, 1, 1]"]),
    ("tiny_moe", []),
    ("tiny_moe", ["model.moe_layer_freq=2", "model.moe_shared_expert_gate=true"]),
    ("tiny_moe", ["model.mtp_layer_mlp=dense"]),
    ("tiny_mla_moe", ["model.mtp_layer_mlp=dense", "model.mtp_ffn_hidden_size=80", "model.mtp_num_layers=2"]),
    ("tiny_mla_moe", []),
    ("tiny_mla_moe", ["model.q_lora_rank=null", "model.qk_layernorm=false"]),
    ("tiny_mla_moe", ["model.moe_layer_freq=[1, 1, 1, 0]", "model.moe_shared_expert_intermediate_size=null"]),
]  # fmt: skip


def make(recipe: str, *overrides: str) -> ConfigContainer:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, list(overrides))
    return cfg.finalize()


@pytest.mark.parametrize(("recipe", "overrides"), VARIANTS, ids=[" ".join([r, *o]) for r, o in VARIANTS])
def test_parameters_equal_the_model_that_is_built(recipe, overrides, one_rank):
    import torch

    from megatron_mtp.model.build import build_model

    cfg = make(recipe, *overrides)
    (chunk,) = build_model(resolve(cfg, 1), one_rank, torch.device("meta"))
    sizes = {name: parameter.numel() for name, parameter in chunk.named_parameters()}
    count = count_parameters(cfg.model)
    parts = {
        "embedding": sum(size for name, size in sizes.items() if name.startswith("embedding.")),
        "output": sum(size for name, size in sizes.items() if name.startswith("output_layer.")),
        "mtp": sum(size for name, size in sizes.items() if name.startswith("mtp.")),
        "trunk": sum(size for name, size in sizes.items() if name.startswith("decoder.")),
    }
    assert {name: getattr(count, name) for name in parts} == parts
    assert count.total == sum(sizes.values())


@pytest.fixture(scope="module")
def one_rank():
    from megatron_mtp.config.sections import DistConfig
    from megatron_mtp.training.setup import join_groups, leave_groups

    cfg = get_recipe("tiny_dense")
    cfg.dist = DistConfig(device="cpu")
    _, groups = join_groups(resolve(cfg.finalize(), 1))
    yield groups
    leave_groups()


def test_published_sizes():
    v3 = count_parameters(get_recipe("deepseek_v3").finalize().model)
    assert v3.main == pytest.approx(671.0e9, rel=1e-3)  # arXiv 2412.19437, abstract
    assert v3.main_active == pytest.approx(37e9, rel=0.02)
    assert v3.mtp == pytest.approx(11.5e9, rel=0.02)  # its README_WEIGHTS: 11.5B unique parameters
    qwen = count_parameters(get_recipe("qwen3_30b_a3b").finalize().model)
    assert qwen.main == pytest.approx(30.5e9, rel=2e-3)
    assert qwen.main_active == pytest.approx(3.3e9, rel=0.02)


def test_active_parameters_of_a_dense_model_are_all():
    count = count_parameters(make("tiny_dense").model)
    assert count.active == count.total
    assert count.main == count.total - count.mtp


def test_vocabulary_is_padded_for_tensor_parallel_ranks():
    model = make("tiny_dense", "model.vocab_size=500", "model.tensor_model_parallel_size=2").model
    assert padded_vocab_size(model) == 512
    model = make("tiny_dense", "model.vocab_size=513", "model.tensor_model_parallel_size=2").model
    assert padded_vocab_size(model) == 768


def megatron_flops(cfg: ConfigContainer) -> float:
    from megatron.training.training import num_floating_point_operations

    model = cfg.model
    args = types.SimpleNamespace(**cfg.to_dict()["model"])
    args.group_query_attention = not model.multi_latent_attention
    args.num_experts = model.num_moe_experts
    args.swiglu = model.gated_linear_unit
    args.padded_vocab_size = padded_vocab_size(model)
    args.moe_latent_size = args.hybrid_layer_pattern = None
    args.is_hybrid_model = False
    return num_floating_point_operations(args, 1) / model.seq_length


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_mla_moe", "qwen3_30b_a3b", "deepseek_v3"])
@pytest.mark.parametrize("depths", [0, 1, 3])
def test_operations_equal_megatrons(recipe, depths):
    cfg = make(recipe, f"model.mtp_num_layers={depths}")
    assert train_flops_per_token(cfg.model) == pytest.approx(megatron_flops(cfg), rel=1e-12)


def test_operations_of_an_mlp_without_gate():
    cfg = make("tiny_dense", "model.gated_linear_unit=false", "model.activation_func=gelu")
    assert train_flops_per_token(cfg.model) == pytest.approx(megatron_flops(cfg), rel=1e-12)


@pytest.mark.parametrize("freq", ["4", "[1, 0, 1, 0]"])
def test_operations_with_linear_attention(freq):
    """Without MTP: Megatron's formula continues the pattern into the MTP layers, which have full attention."""
    changes = ["attention_output_gate=true", "experimental_attention_variant=gated_delta_net", "mtp_num_layers=0"]
    cfg = make("tiny_moe", *(f"model.{change}" for change in [*changes, f"linear_attention_freq={freq}"]))
    assert train_flops_per_token(cfg.model) == pytest.approx(megatron_flops(cfg), rel=1e-12)


def test_a_dense_mtp_layer_costs_its_own_width():
    """Three passes of three matrices of h x width each, in place of those of the chosen and the shared experts."""
    experts = make("tiny_mla_moe", "model.mtp_num_layers=2").model
    dense = make(
        "tiny_mla_moe", "model.mtp_num_layers=2", "model.mtp_layer_mlp=dense", "model.mtp_ffn_hidden_size=80"
    ).model
    routed = experts.moe_router_topk * experts.moe_ffn_hidden_size + experts.moe_shared_expert_intermediate_size
    saved = 2 * 3 * 3 * 2 * experts.hidden_size * (routed - 80)
    assert train_flops_per_token(experts) - train_flops_per_token(dense) == saved


def test_a_frozen_trunk_costs_less():
    full, frozen = make("tiny_dense"), make("tiny_dense", "model.mtp_freeze_trunk=true")
    detached = make("tiny_dense", "model.mtp_detach_heads=true")
    assert (
        train_flops_per_token(frozen.model) < train_flops_per_token(detached.model) < train_flops_per_token(full.model)
    )


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp32", 66.9),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A10", "fp16", 125.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-32GB", "fp16", 112.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("cpu", "fp32", None),
        ("", "fp32", None),
    ],
)
def test_dense_peaks(name, dtype, peak):
    assert dense_peak_tflops(name, dtype) == peak
