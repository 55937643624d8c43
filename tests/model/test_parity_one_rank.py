"""One rank of the program in fp32 equals the plain model in fp64: losses of all depths, counts, acceptance, gradients.

Each case takes a step through `training.setup` and `Engine.train` on a global batch of four micro-batches: all targets
valid, padded ends, random holes, and one without a single valid target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from megatron_mtp.data.batch import make_micro_batch
from tests.model.comparison import assert_same, assert_same_routing
from tests.model.parity import global_batch, plain_model, plain_step, program_step
from tests.reference.plain_model import LatentConfig, MoEConfig, PlainConfig

pytestmark = pytest.mark.unit

DENSE = PlainConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_groups=2,
    head_dim=8,
    vocab_size=50,
    padded_vocab_size=64,
    ffn_size=48,
    qk_norm=True,
    num_depths=2,
    mtp_lambda=0.3,
)
SOFTMAX = MoEConfig(num_experts=6, topk=2, ffn_size=16)
SIGMOID = MoEConfig(
    num_experts=8,
    topk=4,
    ffn_size=16,
    shared_ffn_size=24,
    score_function="sigmoid",
    num_groups=4,
    group_topk=2,
    scaling_factor=2.5,
    expert_bias=True,
    seq_aux_coeff=0.01,
    z_coeff=0.001,
)
LATENT = LatentConfig(q_lora_rank=12, kv_lora_rank=10, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=5)
MLA_MOE = replace(
    DENSE, num_groups=None, head_dim=None, qk_norm=False, latent=LATENT, moe=SIGMOID, moe_layers=(False, True)
)
MOE = replace(DENSE, moe=SOFTMAX)


@dataclass(frozen=True)
class Case:
    plain: PlainConfig
    documents: bool = False


CASES = {
    "dense": Case(DENSE),
    "dense_documents": Case(DENSE, documents=True),
    "no_depths": Case(replace(DENSE, num_depths=0)),
    "one_depth_tied": Case(replace(DENSE, num_depths=1, tied=True)),
    "tied_bias_layernorm_gelu": Case(
        replace(DENSE, tied=True, bias=True, normalization="LayerNorm", gated=False, activation="gelu")
    ),
    "zero_centered_partial_rope_qkv_bias": Case(
        replace(DENSE, zero_centered_gamma=True, rope_percent=0.5, qkv_bias=True, qk_norm=False, num_groups=4)
    ),
    "depth_weights_z_loss": Case(replace(DENSE, mtp_weights=(1.0, 0.25), logits_z_coeff=1e-3)),
    "repeated": Case(replace(DENSE, mtp_repeated=True), documents=True),
    "detached": Case(replace(DENSE, mtp_detach=True)),
    "detached_tied": Case(replace(DENSE, mtp_detach=True, tied=True)),
    "frozen_trunk": Case(replace(DENSE, mtp_freeze_trunk=True)),
    "pre_final_norm": Case(replace(DENSE, mtp_hidden="pre_final_norm")),
    "parallel": Case(replace(DENSE, mtp_variant="parallel"), documents=True),
    "parallel_detached_pre_norm": Case(
        replace(DENSE, mtp_variant="parallel", mtp_detach=True, mtp_hidden="pre_final_norm")
    ),
    "moe": Case(MOE),
    "moe_pre_softmax_shared_gate": Case(
        replace(MOE, moe=replace(SOFTMAX, pre_softmax=True, shared_ffn_size=24, shared_gate=True, z_coeff=0.01)),
        documents=True,
    ),
    "moe_seq_aux": Case(replace(MOE, moe=replace(SOFTMAX, seq_aux_coeff=0.1)), documents=True),
    "moe_biases": Case(replace(MOE, bias=True)),
    "moe_dense_depths": Case(replace(MOE, mtp_ffn_size=40)),
    "moe_dense_repeated_depths": Case(replace(MLA_MOE, mtp_ffn_size=40, mtp_repeated=True)),
    "mla_dense": Case(replace(MLA_MOE, moe=None, moe_layers=None)),
    "mla_no_latent_norms": Case(
        replace(MLA_MOE, moe=None, moe_layers=None, latent=replace(LATENT, q_lora_rank=None, latent_norms=False))
    ),
    "mla_moe": Case(MLA_MOE),
    "mla_moe_documents": Case(replace(MLA_MOE, tied=True), documents=True),
    "mla_moe_repeated": Case(replace(MLA_MOE, mtp_repeated=True, moe=replace(SIGMOID, z_coeff=0.0))),
    "mla_moe_repeated_z_loss": Case(replace(MLA_MOE, mtp_repeated=True)),
    "mla_moe_parallel": Case(replace(MLA_MOE, mtp_variant="parallel")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_the_plain_model(name):
    case = CASES[name]
    model, batches = plain_model(case.plain), global_batch(case.documents)
    got, expected = program_step(model, batches), plain_step(model, batches)
    assert_same_routing(got.routing_maps, expected.routing_maps)
    assert_same(got, expected)


@pytest.mark.parametrize("samples_of_each", [1, 4, 8])
@pytest.mark.parametrize("name", ["dense_documents", "mla_moe"])
def test_how_samples_are_grouped_does_not_matter(name, samples_of_each):
    """Other micro-batch sizes against the plain model's step on micro-batches of two."""
    case = CASES[name]
    pairs = global_batch(case.documents)
    joined = {key: None if pairs[0][key] is None else torch.cat([pair[key] for pair in pairs]) for key in pairs[0]}
    grouped = [
        {key: None if whole is None else whole[first : first + samples_of_each] for key, whole in joined.items()}
        for first in range(0, 8, samples_of_each)
    ]
    model = plain_model(case.plain)
    assert_same(program_step(model, grouped), plain_step(model, pairs))


def without_documents(samples, rules):
    return replace(make_micro_batch(samples, rules), segment_ids=None)


def with_every_target(samples, rules):
    batch = make_micro_batch(samples, rules)
    return replace(batch, loss_mask=torch.ones_like(batch.loss_mask))


def reading_one_token_too_far(samples, rules):
    batch = make_micro_batch(samples, rules)
    return replace(batch, shifted_ids=batch.shifted_ids.roll(-1, dims=-1))


@pytest.mark.parametrize("fault", [without_documents, with_every_target, reading_one_token_too_far])
def test_a_fault_in_the_data_room_shows(monkeypatch, fault):
    """The program's step goes through make_micro_batch; the plain model shifts and masks by its own code."""
    monkeypatch.setattr("megatron_mtp.data.loader.make_micro_batch", fault)
    model, batches = plain_model(DENSE), global_batch(documents=True)
    with pytest.raises(AssertionError):
        assert_same(program_step(model, batches), plain_step(model, batches))
