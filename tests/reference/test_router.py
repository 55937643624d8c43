"""Routing, router losses and the expert bias against loops over tokens and experts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.reference.plain_model import MoEConfig, PlainConfig, PlainMTPModel, combine
from tests.reference.plain_moe import route, sequence_balance, updated_expert_bias

pytestmark = pytest.mark.unit

MOE = MoEConfig(num_experts=8, topk=2, ffn_size=8)
LOGITS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def softmax(values: list[float]) -> list[float]:
    return [math.exp(v) / sum(math.exp(w) for w in values) for v in values]


def best(values: list[float], count: int, among: list[int] | None = None) -> list[int]:
    return sorted(among or range(len(values)), key=lambda e: -values[e])[:count]


def check(moe: MoEConfig, weights_of_token, bias: torch.Tensor | None = None) -> None:
    chosen, weights = route(LOGITS, moe, bias)
    for row in range(2):
        for t in range(5):
            expected = weights_of_token(LOGITS[row, t].tolist())
            assert chosen[row, t].nonzero().flatten().tolist() == sorted(expected)
            assert weights[row, t].tolist() == pytest.approx([expected.get(e, 0.0) for e in range(8)], rel=1e-14)


def test_softmax_over_the_chosen():
    def weights(z):
        top = best(z, 2)
        return dict(zip(top, softmax([z[e] for e in top]), strict=True))

    check(MOE, weights)


def test_softmax_before_the_choice_is_not_normalised_again():
    check(replace(MOE, pre_softmax=True), lambda z: {e: softmax(z)[e] for e in best(z, 2)})


def test_sigmoid_with_bias_groups_and_scaling():
    bias = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moe = replace(
        MOE, topk=4, score_function="sigmoid", num_groups=4, group_topk=2, scaling_factor=2.5, expert_bias=True
    )

    def weights(z):
        scores = [1 / (1 + math.exp(-v)) for v in z]
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        # topk / group_topk = 2, both members of a group of two
        group_scores = [biased[2 * g] + biased[2 * g + 1] for g in range(4)]
        among = [e for g in best(group_scores, 2) for e in (2 * g, 2 * g + 1)]
        top = best(biased, 4, among)
        return {e: 2.5 * scores[e] / sum(scores[f] for f in top) for e in top}

    check(moe, weights, bias)


def test_one_sigmoid_expert_keeps_its_raw_score():
    check(replace(MOE, topk=1, score_function="sigmoid"), lambda z: {best(z, 1)[0]: 1 / (1 + math.exp(-max(z)))})


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_sequence_balance_equals_loops(score_function):
    moe = replace(MOE, score_function=score_function)
    for row, loss in enumerate(sequence_balance(LOGITS, moe)):
        mean_score, frequency = [0.0] * 8, [0.0] * 8
        for t in range(5):
            z = LOGITS[row, t].tolist()
            raw = [math.exp(v) if score_function == "softmax" else 1 / (1 + math.exp(-v)) for v in z]
            for e in range(8):
                mean_score[e] += raw[e] / sum(raw) / 5
            for e in best(z, 2):
                frequency[e] += 8 / (2 * 5)
        assert loss.item() == pytest.approx(sum(f * p for f, p in zip(frequency, mean_score, strict=True)), rel=1e-13)


def test_balanced_routing_has_the_balance_loss_one():
    # Token t prefers experts t and t+1 of 8 so strongly that p is 1/2 on both: f_e = 1, P_e = 1/8.
    logits = torch.zeros(1, 8, 8, dtype=torch.float64)
    for t in range(8):
        logits[0, t, [t, (t + 1) % 8]] = 60.0
    assert sequence_balance(logits, MOE).item() == pytest.approx(1.0, rel=1e-12)


def test_expert_bias_moves_towards_the_mean():
    bias = updated_expert_bias(torch.zeros(4, dtype=torch.float64), torch.tensor([3, 1, 2, 2]), 1e-3)
    assert bias.tolist() == [-1e-3, 1e-3, 0.0, 0.0]


CFG = PlainConfig(
    num_layers=2,
    hidden_size=12,
    num_heads=2,
    vocab_size=15,
    ffn_size=16,
    num_depths=2,
    moe=MoEConfig(
        num_experts=4, topk=2, ffn_size=8, score_function="sigmoid", expert_bias=True, seq_aux_coeff=0.1, z_coeff=0.01
    ),
    moe_layers=(False, True),
)
TOKENS = torch.randint(0, 15, (4, 9), generator=torch.Generator().manual_seed(2))


def test_router_losses_are_means_over_the_global_batch():
    model = PlainMTPModel(CFG).double()
    whole, halves = model(TOKENS), [model(TOKENS[:2]), model(TOKENS[2:])]
    assert len(whole.routers) == 3  # one trunk layer, two depths
    together, apart = whole.totals, combine(halves)
    for name in ("load_balancing_loss", "z_loss"):
        assert apart.router_losses[name].item() == pytest.approx(together.router_losses[name].item(), rel=1e-13)
    main = together.losses[0] + 0.05 * (together.losses[1] + together.losses[2])
    router = 0.1 * together.router_losses["load_balancing_loss"] + 0.01 * together.router_losses["z_loss"]
    assert together.total.item() == pytest.approx((main + router).item(), rel=1e-14)


def test_a_repeated_layer_counts_once_in_router_losses():
    model = PlainMTPModel(replace(CFG, mtp_repeated=True)).double()
    output = model(TOKENS)
    trunk, first, second = (r.balance_sum for r in output.routers)
    expected = (trunk + (first + second) / 2) / 4
    assert output.totals.router_losses["load_balancing_loss"].item() == pytest.approx(expected.item(), rel=1e-14)


def test_expert_biases_follow_the_counts_of_all_micro_batches():
    model = PlainMTPModel(CFG).double()
    before = [block.mlp.expert_bias.clone() for block in model.routed_blocks()]
    totals = model.global_batch([{"tokens": TOKENS[:1]}, {"tokens": TOKENS[1:]}])
    assert all(int(tokens.sum()) == 4 * 8 * 2 for tokens in totals.tokens_per_expert)
    model.update_expert_biases(totals)
    for block, old, tokens in zip(model.routed_blocks(), before, totals.tokens_per_expert, strict=True):
        step = (block.mlp.expert_bias - old).tolist()
        assert step == pytest.approx([1e-3 * ((n < 16) - (n > 16)) for n in tokens.tolist()], abs=1e-12)
