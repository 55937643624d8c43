"""Whole layers of the torch backend at tensor- and expert-parallel layouts: every gradient equals that of one rank."""

from __future__ import annotations

import functools

import pytest

from tests.model.torch_backend.gradients import gradients, worst_difference

pytestmark = pytest.mark.dist
# Relative, for each parameter. A bias of k_layernorm is nearly cancelled by the softmax: 2.4e-6.
TOLERANCE = 5e-6

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
TP4_SP = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}


@pytest.fixture(scope="module")
def reference(ranks):
    """Gradients of four data-parallel ranks that read the same tokens: those of one rank."""

    @functools.cache
    def run(kind, fields):
        return ranks(4).run(gradients, kind, dict(fields))[0]

    return lambda kind, fields: run(kind, tuple(fields.items()))


def check(ranks, reference, kind, fields, layout):
    got = ranks(4).run(gradients, kind, {**fields, **layout})[0]
    difference, name = worst_difference(got, reference(kind, fields))
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("layout", [TP2, TP2_SP, TP4_SP], ids=["tp2", "tp2+sp", "tp4+sp"])
def test_dense(ranks, reference, layout, normalization):
    fields = {"qk_layernorm": True, "normalization": normalization, "add_bias_linear": normalization == "LayerNorm"}
    check(ranks, reference, "dense", fields, layout)


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}], ids=["q_lora", "full_q"])
@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["", "latent_norms"])
@pytest.mark.parametrize("layout", [TP2, TP2_SP, TP4_SP], ids=["tp2", "tp2+sp", "tp4+sp"])
def test_multi_latent_attention(ranks, reference, layout, qk_layernorm, fields):
    check(ranks, reference, "mla", {"qk_layernorm": qk_layernorm, **fields}, layout)


@pytest.mark.parametrize(
    "layout",
    [
        EP2,
        EP4,
        {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1},
        {**TP2_SP, **EP2, "expert_tensor_parallel_size": 2},
        {**TP2_SP, "expert_tensor_parallel_size": 2},
    ],
    ids=["ep2", "ep4", "tp2+sp+ep2", "tp2+sp+ep2+etp2", "tp2+sp+etp2"],
)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_experts(ranks, reference, layout, dispatcher):
    check(ranks, reference, "moe", {"moe_token_dispatcher_type": dispatcher}, layout)


@pytest.mark.parametrize("layout", [TP2, TP2_SP], ids=["tp2", "tp2+sp"])
def test_gated_delta_net(ranks, reference, layout):
    """Megatron-Core sums the gradient of the shared output norm under sequence parallelism only."""
    check(ranks, reference, "delta_net", {}, layout)


def test_selective_recomputation_of_core_attention(ranks, reference):
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    check(ranks, reference, "dense", {"qk_layernorm": True}, recompute)


def test_selective_recomputation_of_the_latents(ranks, reference):
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"], **TP2_SP}
    check(ranks, reference, "mla", {"qk_layernorm": True}, recompute)


@pytest.mark.parametrize(
    ("qk_layernorm", "layout"), [(False, TP2), (False, TP2_SP), (True, TP2)], ids=["key", "key+sp", "norm"]
)
def test_upstream_is_still_wrong(ranks, reference, qk_layernorm, layout):
    """When this fails, Megatron-Core has fixed what ExactMLASelfAttention fixes."""
    fields = {"qk_layernorm": qk_layernorm}
    got = ranks(4).run(gradients, "mla", {**fields, **layout}, True)[0]
    assert worst_difference(got, reference("mla", fields))[0] > 0.1
