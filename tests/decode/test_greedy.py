"""Greedy decoding gives the same tokens with and without drafts, and those of the plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mtp.decode.speculate import Options, generate
from megatron_mtp.errors import DataError
from tests.decode.models import DENSE, LATENT, MLA, MOE, VARIANTS, decoder_of, plain_model, random_tokens

pytestmark = pytest.mark.unit

# Four ids: drafts of random weights are right now and then, so that every number of accepted drafts occurs.
KINDS = {name: replace(plain, vocab_size=4) for name, plain in (("dense", DENSE), ("moe", MOE), ("mla", MLA))}
NEW_TOKENS = 16


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 9 tokens."""
    lengths = [1 + (7 * row + seed) % 9 for row in range(count)]
    return [random_tokens(n, seed=100 * seed + row, vocab_size=4).tolist() for row, n in enumerate(lengths)]


def tokens(decoder, rows, num_draft, **others):
    return generate(decoder, rows, Options(max_new_tokens=NEW_TOKENS, num_draft=num_draft, context=64, **others)).tokens


@torch.no_grad()
def plain_greedy(model, prompt):
    """By complete forward passes of the reference, without any cache."""
    text = list(prompt)
    for _ in range(NEW_TOKENS):
        hidden = model.hidden_states([torch.tensor([text])] * (1 + model.cfg.num_depths))[0]
        text.append(int(model.logits(hidden[:, -1:], 0).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_architecture(name):
    model = plain_model(VARIANTS[name])
    decoder, rows = decoder_of(model), prompts(3, seed=2)
    expected = tokens(decoder, rows, 0)
    assert expected == [plain_greedy(model.double(), row) for row in rows]
    assert tokens(decoder, rows, 3) == expected


def test_latents_of_odd_rank():
    """The rotary key of a single token begins at an odd offset of its row."""
    model = plain_model(replace(MLA, latent=replace(LATENT, kv_lora_rank=11)))
    decoder, (row,) = decoder_of(model), prompts(1, seed=2)
    assert tokens(decoder, [row], 0) == [plain_greedy(model.double(), row)]


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_depths_and_drafts(kind, depths):
    """A batch of three prompts of different lengths, for each K up to 6: 54 cells. See test_ranks for TP."""
    decoder = decoder_of(plain_model(replace(KINDS[kind], num_depths=depths), seed=depths))
    rows = prompts(3, seed=depths)
    expected = tokens(decoder, rows, 0)
    for num_draft in range(1, 7):
        assert tokens(decoder, rows, num_draft) == expected
    assert [tokens(decoder, [row], 4)[0] for row in rows] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_many_different_prompts(kind):
    """200 prompts of 4 to 40 tokens over the three kinds, each in a batch with others."""
    decoder = decoder_of(plain_model(KINDS[kind], seed=3))
    rows = [random_tokens(4 + row % 37, seed=900 + row, vocab_size=4).tolist() for row in range(67)]
    assert len({tuple(row) for row in rows}) > 64
    assert tokens(decoder, rows, 2) == tokens(decoder, rows, 0)


def test_some_drafts_are_accepted_and_some_are_not():
    """Otherwise the tests above prove little. Every accepted draft saves a pass."""
    total, proposed = [0, 0, 0], 0
    for kind, seed in (("dense", 4), ("moe", 4), ("mla", 5)):
        decoder = decoder_of(plain_model(KINDS[kind], seed=seed))
        for row in prompts(4, 8):
            counts = generate(decoder, [row], Options(max_new_tokens=48, num_draft=3, context=64)).counts
            assert counts.new_tokens == 47 == counts.rounds + sum(counts.accepted)
            total, proposed = (
                [a + b for a, b in zip(total, counts.accepted, strict=True)],
                proposed + counts.proposed[0],
            )
    assert 0 < total[2] < total[1] < total[0] < proposed


@pytest.mark.parametrize("widths", [(2,), (3, 1), (2, 2, 1), (1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_tree(kind, widths):
    decoder = decoder_of(plain_model(KINDS[kind]))
    for row in prompts(2, seed=5):
        assert tokens(decoder, [row], 0) == tokens(decoder, [row], 0, widths=widths)


def test_drafts_of_some_ids_only():
    model = plain_model(KINDS["moe"], seed=4)
    decoder, row = decoder_of(model), prompts(1, seed=3)
    everything = tokens(decoder, row, 3)
    decoder.limit_drafts(model.head.weight.detach(), 2)
    assert decoder.draft_logits(torch.zeros(1, 32)).shape == (1, 2)
    assert tokens(decoder, row, 3) == everything
    decoder.limit_drafts(model.head.weight.detach(), None)
    assert decoder.draft_head is decoder.head


def test_automatic_number_of_drafts():
    decoder = decoder_of(plain_model(DENSE))
    rows, options = prompts(2, seed=6), Options(max_new_tokens=200, num_draft="auto", context=256)
    assert generate(decoder, rows, options).tokens == generate(decoder, rows, replace(options, num_draft=0)).tokens


def test_stops_and_streams():
    decoder = decoder_of(plain_model(DENSE))
    rows = prompts(2, seed=7)
    free = tokens(decoder, rows, 3)
    stop = free[0][5]
    seen: list[list[int]] = [[], []]
    options = Options(max_new_tokens=NEW_TOKENS, num_draft=3, context=64, stop_ids=frozenset({stop}))
    result = generate(decoder, rows, options, on_tokens=lambda row, new: seen[row].extend(new))
    for got, whole in zip(result.tokens, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert got == whole[:end]
    assert seen == result.tokens


@pytest.mark.parametrize("num_draft", [0, 3])
def test_rows_get_what_the_context_holds(num_draft):
    """With `shorten` a long prompt gets fewer tokens, the others what they would get alone; without, it is refused."""
    decoder = decoder_of(plain_model(KINDS["dense"]))
    rows = [*prompts(2, seed=1), random_tokens(59, seed=5, vocab_size=4).tolist()]
    with pytest.raises(DataError, match=r"Prompt 2 has 59 tokens and 16 are to follow"):
        tokens(decoder, rows, num_draft)
    found = tokens(decoder, rows, num_draft, shorten=True)
    assert found[:2] == tokens(decoder, rows[:2], num_draft)
    assert len(found[2]) == 5
    assert found[2] == generate(decoder, rows[2:], Options(max_new_tokens=5, context=64)).tokens[0]
    with pytest.raises(DataError, match=r"Prompt 0 has 64 tokens and 1 are to follow"):
        tokens(decoder, [random_tokens(64, vocab_size=4).tolist()], num_draft, shorten=True)


@pytest.mark.parametrize("num_draft", [0, 4])
def test_a_condition_ends_a_row(num_draft):
    """`is_end` sees each prefix of the new tokens, also within a round; `is_ended` tells an end from a limit."""
    decoder, rows = decoder_of(plain_model(KINDS["dense"])), prompts(3, seed=4)
    complete = tokens(decoder, rows, 0)
    options = Options(max_new_tokens=NEW_TOKENS, num_draft=num_draft, context=64, is_end=lambda new: len(new) == 7)
    result = generate(decoder, rows, options)
    assert result.tokens == [row[:7] for row in complete]
    assert result.is_ended == [True] * 3
    assert not any(generate(decoder, rows, Options(max_new_tokens=4, num_draft=num_draft, context=64)).is_ended)
    # Every row's first token is the prefill's; a pass yields the others.
    assert result.counts.new_tokens == sum(map(len, result.tokens)) - len(rows)
