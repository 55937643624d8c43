"""Sampling with drafts follows the target distribution: exact enumeration on tiny vocabularies. A biased rule fails."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_mtp.decode import speculate as loop
from megatron_mtp.decode.sampling import Sampling, accept_sampled, draw
from megatron_mtp.decode.speculate import Options, generate
from megatron_mtp.errors import ConfigError
from tests.decode.models import DENSE, decoder_of, plain_model

pytestmark = pytest.mark.unit


def total_variation(samples, exact):
    """samples: [n] numbers of cells; exact: [cells] probabilities."""
    counts = torch.bincount(samples, minlength=len(exact)).double()
    return float((counts / counts.sum() - exact).abs().sum() / 2)


def bound(cells, n, failure=1e-6):
    """Total variation of n true samples stays below this but for one run in a million.

    The mean is at most sqrt(cells / n) / 2 (Cauchy-Schwarz over the cells' standard deviations), and one sample moves
    it by at most 1/n (McDiarmid).
    """
    return math.sqrt(cells / n) / 2 + math.sqrt(math.log(1 / failure) / (2 * n))


def redraws_from_target(drafts, proposed, target, generator):
    """Biased: after a refusal it draws from p instead of what q left of it."""
    accepted, _ = accept_sampled(drafts, proposed, target, generator)
    return accepted, draw(target[torch.arange(len(drafts)), accepted], generator)


def accepts_half(drafts, proposed, target, generator):
    """Biased: takes drafts with probability one half, whatever p and q are."""
    return accept_sampled(drafts, torch.full_like(proposed, 0.5), torch.full_like(target, 0.25), generator)


@pytest.mark.parametrize(
    ("rule", "is_exact"), [(accept_sampled, True), (redraws_from_target, False), (accepts_half, False)]
)
def test_the_rule(rule, is_exact):
    """Three tokens of a Markov chain with 5 states, two of them drafted by another chain."""
    n, v = 400_000, 5
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.softmax(2 * torch.randn(v, v, generator=generator), dim=-1) for _ in range(2))
    p[:, 3] = 0  # a token that the target never takes
    p /= p.sum(-1, keepdim=True)
    first = draw(q[0].expand(n, v), generator)
    drafts = torch.stack((first, draw(q[first], generator)), dim=1)
    proposed = torch.stack((q[0].expand(n, v), q[first]), dim=1)
    target = torch.stack((p[0].expand(n, v), p[first], p[drafts[:, 1]]), dim=1)
    accepted, following = rule(drafts, proposed, target, generator)

    text = torch.cat((drafts, drafts[:, :1]), dim=1)
    text[torch.arange(n), accepted] = following
    for position in (1, 2):  # what the round did not reach is drawn from the target
        later = accepted < position
        text[later, position] = draw(p[text[later, position - 1]], generator)
    exact = torch.einsum("a,ab,bc->abc", p[0], p, p).flatten().double()
    distance = total_variation(text[:, 0] * v * v + text[:, 1] * v + text[:, 2], exact)
    assert (distance < bound(v**3, n)) == is_exact


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.3, top_p=0.8)],
    ids=["all", "top_k", "top_p"],
)
@pytest.mark.parametrize("draft_vocab", [None, 3])
@pytest.mark.parametrize("rule", [None, redraws_from_target])
def test_a_model(sampling, rule, draft_vocab, monkeypatch):
    """20 000 rows of 3 tokens from a model with 4 ids, against products of the reference's probabilities."""
    model = plain_model(replace(DENSE, vocab_size=4, num_depths=2), seed=4).double()
    if rule is not None:
        if draft_vocab or sampling.top_k or sampling.top_p < 1:
            pytest.skip("one biased model is enough")
        monkeypatch.setattr(loop, "accept_sampled", rule)
    prompt, n, v = [1, 3, 0], 20_000, 4
    options = Options(max_new_tokens=3, num_draft=2, sampling=replace(sampling, seed=5))
    decoder = decoder_of(model)
    decoder.limit_drafts(model.head.weight.detach(), draft_vocab)
    rows = torch.tensor(generate(decoder, [prompt] * n, replace(options, context=16)).tokens)
    exact = torch.tensor([probability(model, prompt, text, sampling) for text in itertools.product(range(v), repeat=3)])
    distance = total_variation(rows[:, 0] * v * v + rows[:, 1] * v + rows[:, 2], exact.double())
    assert (distance < bound(v**3, n)) == (rule is None)


@torch.no_grad()
def probability(model, prompt, text, sampling):
    ids = torch.tensor([[*prompt, *text]])
    logits = model.logits(model.hidden_states([ids] * 3)[0], 0)[0, len(prompt) - 1 : -1]
    return float(sampling.probabilities(logits)[torch.arange(3), list(text)].double().prod())


def test_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    exact = torch.softmax(logits, -1)
    torch.testing.assert_close(Sampling(1.0).probabilities(logits), exact)
    torch.testing.assert_close(Sampling(0.5).probabilities(logits), torch.softmax(2 * logits, -1))
    torch.testing.assert_close(
        Sampling(1.0, top_k=2).probabilities(logits), torch.cat((torch.softmax(logits[:2], -1), torch.zeros(2)))
    )
    # 0.64, 0.24, 0.09, 0.03: the first two together reach 0.8, the first alone does not.
    torch.testing.assert_close(
        Sampling(1.0, top_p=0.8).probabilities(logits), torch.cat((torch.softmax(logits[:2], -1), torch.zeros(2)))
    )
    assert Sampling(1.0, top_p=0.5).probabilities(logits).tolist() == [1, 0, 0, 0]


def test_same_seed_same_tokens():
    decoder = decoder_of(plain_model(DENSE))
    options = Options(max_new_tokens=12, num_draft=2, sampling=Sampling(1.0, seed=1), context=64)
    first = generate(decoder, [[1, 2]], options).tokens
    assert generate(decoder, [[1, 2]], options).tokens == first
    other = replace(options, sampling=Sampling(1.0, seed=2))
    assert generate(decoder, [[1, 2]], other).tokens != first


def test_refused_values():
    with pytest.raises(ConfigError) as error:
        Sampling(-1.0, top_k=-2, top_p=0.0)
    assert len(error.value.problems) == 3
