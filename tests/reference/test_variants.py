"""What may reach what: causality along depths, documents, detached heads, frozen trunk, repeated layer, parallel
heads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.reference.plain_model import LatentConfig, MoEConfig, PlainConfig, PlainMTPModel

pytestmark = pytest.mark.unit

DENSE = PlainConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_groups=2,
    head_dim=6,
    vocab_size=20,
    ffn_size=24,
    qk_norm=True,
    num_depths=2,
)
MLA = replace(
    DENSE,
    qk_norm=False,
    latent=LatentConfig(q_lora_rank=6, kv_lora_rank=5, qk_head_dim=4, qk_pos_emb_head_dim=4, v_head_dim=3),
    moe=MoEConfig(num_experts=4, topk=2, ffn_size=8, shared_ffn_size=8, score_function="sigmoid", expert_bias=True),
    moe_layers=(False, True),
)
TOKENS = torch.randint(0, 20, (2, 13), generator=torch.Generator().manual_seed(3))


def gradients(model: PlainMTPModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("cfg", [DENSE, MLA], ids=["dense", "mla_moe"])
def test_a_depth_sees_tokens_up_to_i_plus_k_only(cfg):
    model = PlainMTPModel(cfg).double()
    for changed in range(13):
        other = TOKENS.clone()
        other[:, changed] = (other[:, changed] + 1) % 20
        for depth, (a, b) in enumerate(zip(model(TOKENS).logits, model(other).logits, strict=True)):
            same = (a == b).all(-1).all(0)
            first_to_see = max(changed - depth, 0)
            assert same[:first_to_see].all()
            if first_to_see < 12:
                assert not same[first_to_see]


@pytest.mark.parametrize(
    "cfg", [DENSE, MLA, replace(DENSE, mtp_variant="parallel")], ids=["dense", "mla_moe", "parallel"]
)
def test_documents_equal_separate_runs(cfg):
    # Rows of documents of 5, 3 and 4 slots. RoPE is relative, so a document alone gives the same logits; a target lies
    # in the document of its slot, so each document alone has one target fewer at each depth.
    model = PlainMTPModel(cfg).double()
    bounds = [(0, 5), (5, 8), (8, 12)]
    segment_ids = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4] * 2)
    base_mask = torch.ones(2, 12)
    base_mask[:, -1] = 0  # t[12] begins the next document
    packed = model(TOKENS, base_mask, segment_ids)
    alone = [model(TOKENS[:, low:high]) for low, high in bounds]
    torch.testing.assert_close(packed.counts, sum(o.counts for o in alone))
    torch.testing.assert_close(packed.sums, sum(o.sums for o in alone), rtol=1e-12, atol=0)


def test_positions_restart_or_run_on_alike():
    model = PlainMTPModel(DENSE).double()
    segment_ids = torch.tensor([[0] * 5 + [1] * 7] * 2)
    restarted = torch.tensor([[*range(5), *range(7)]] * 2)
    run_on, restart = (model(TOKENS, None, segment_ids, positions) for positions in (None, restarted))
    torch.testing.assert_close(restart.sums, run_on.sums, rtol=1e-12, atol=0)
    absolute = model(TOKENS, None, None, restarted).sums
    assert not torch.allclose(absolute, model(TOKENS).sums, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_detached_heads_train_only_mtp(tied):
    model = PlainMTPModel(replace(DENSE, mtp_detach=True, tied=tied)).double()
    output = model(TOKENS)
    reached = gradients(model, output.losses[1] + output.losses[2])
    assert set(reached) == {name for name, _ in model.named_parameters() if name.startswith("mtp.")}
    plain = PlainMTPModel(replace(DENSE, tied=tied)).double()
    expected = gradients(plain, plain(TOKENS).losses[1:].sum())
    assert {n for n in expected if not n.startswith("mtp.")}, "without detaching, the trunk must be reached"
    for name, gradient in reached.items():  # what is detached lies upstream of the MTP weights
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_frozen_trunk_has_no_gradients():
    model = PlainMTPModel(replace(DENSE, mtp_freeze_trunk=True)).double()
    reached = gradients(model, model(TOKENS).total)
    assert set(reached) == {name for name, _ in model.named_parameters() if name.startswith("mtp.")}


def test_repeated_layer_equals_two_equal_layers():
    once, twice = PlainMTPModel(replace(DENSE, mtp_repeated=True)).double(), PlainMTPModel(DENSE).double()
    weights = once.state_dict()
    weights |= {name.replace("mtp.0.", "mtp.1."): tensor for name, tensor in weights.items()}
    twice.load_state_dict(weights)
    assert once(TOKENS).losses.tolist() == twice(TOKENS).losses.tolist()
    a, b = gradients(once, once(TOKENS).total), gradients(twice, twice(TOKENS).total)
    for name in (n for n in a if n.startswith("mtp.")):
        torch.testing.assert_close(a[name], b[name] + b[name.replace("mtp.0.", "mtp.1.")], rtol=1e-12, atol=1e-15)


def test_parallel_heads_are_independent_and_read_no_token():
    model = PlainMTPModel(replace(DENSE, mtp_variant="parallel")).double()
    for depth in (1, 2):
        reached = gradients(model, model(TOKENS).losses[depth])
        assert {name.split(".")[1] for name in reached if name.startswith("mtp.")} == {str(depth - 1)}
    other = TOKENS.clone()
    other[:, 7] = (other[:, 7] + 1) % 20
    for a, b in zip(model(TOKENS).logits, model(other).logits, strict=True):
        assert torch.equal(a[:, :7], b[:, :7])
        assert not torch.equal(a[:, 7], b[:, 7])


def test_hidden_source_moves_the_final_norm():
    post, pre = (
        PlainMTPModel(replace(DENSE, mtp_hidden=source)).double() for source in ("post_final_norm", "pre_final_norm")
    )
    a, b = post(TOKENS), pre(TOKENS)
    assert a.losses[0].item() == b.losses[0].item()
    assert a.losses[1].item() != b.losses[1].item()
    assert "final_norm.weight" in gradients(post, a.losses[1])
    assert "final_norm.weight" not in gradients(pre, b.losses[1])


@pytest.mark.parametrize(
    "cfg",
    [
        replace(DENSE, num_layers=1, tied=True, bias=True, normalization="LayerNorm", gated=False, activation="gelu"),
        replace(
            DENSE, num_layers=1, zero_centered_gamma=True, rope_percent=0.5, qkv_bias=True, mtp_hidden="pre_final_norm"
        ),
        replace(MLA, num_layers=1, moe_layers=(True,), moe=replace(MLA.moe, seq_aux_coeff=0.1, z_coeff=0.01)),
    ],
    ids=["layernorm_gelu_bias", "zero_centered_partial_rope", "mla_moe"],
)
def test_gradients_equal_finite_differences(cfg):
    model = PlainMTPModel(replace(cfg, mtp_lambda=1.0)).double()
    names, values = zip(*model.named_parameters(), strict=True)
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 0, 1]])
    segment_ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])

    def total(*tensors: Tensor) -> Tensor:
        batch = (TOKENS[:, :6], mask, segment_ids)
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), batch).total

    assert torch.autograd.gradcheck(total, values, fast_mode=True)
