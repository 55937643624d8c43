"""The decoder's forward pass, in one piece and slot by slot, against the plain model in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_mtp.decode.span import Span, TreeSpan
from tests.decode.models import DENSE, MLA, VARIANTS, decoder_of, plain_model, random_tokens

pytestmark = pytest.mark.unit

LENGTH, DEPTHS = 14, 3
# fp32 against fp64 at logits of about 1; the training model is held to 2e-6 in its losses.
TOLERANCE = 2e-5


def expected_logits(model, tokens):
    """[1+D] times [b, s, v]; shifted ids run over the end with zeros, which only the last slots see."""
    padded = torch.nn.functional.pad(tokens, (0, DEPTHS))
    inputs = [padded[:, k : k + tokens.shape[1]] for k in range(1 + DEPTHS)]
    with torch.no_grad():
        return [model.logits(hidden, depth) for depth, hidden in enumerate(model.double().hidden_states(inputs))]


def run_pieces(decoder, tokens, pieces, starts_of=None):
    """Feeds `pieces` tokens at a time through trunk and depths; returns logits of every depth, [b, s, v]."""
    b, length = tokens.shape
    padded = torch.nn.functional.pad(tokens, (0, DEPTHS))
    masks, cis = decoder.positions(length + 8)
    trunk_caches, depth_caches = decoder.new_caches(b, length + 8, DEPTHS)
    results = [[] for _ in range(1 + DEPTHS)]
    start = 0
    for q in pieces:
        span = Span([start] * b, q, masks, cis)
        hidden, source = decoder.trunk(padded[:, start : start + q], span, trunk_caches)
        results[0].append(decoder.logits(hidden).view(b, q, -1))
        hidden = source
        for k in range(1, DEPTHS + 1):
            reads = source if decoder.is_parallel else hidden
            hidden = decoder.depth(k, reads, padded[:, start + k : start + k + q], span, depth_caches[k - 1])
            results[k].append(decoder.logits(hidden).view(b, q, -1))
        start += q
    return [torch.cat(parts, dim=1) for parts in results]


@pytest.mark.parametrize("pieces", [[LENGTH], [1] * LENGTH, [5, 1, 3, 1, 4]], ids=["whole", "single", "mixed"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_of_all_depths(name, pieces):
    model = plain_model(VARIANTS[name])
    decoder, tokens = decoder_of(model), random_tokens(2, LENGTH)
    for got, wanted in zip(run_pieces(decoder, tokens, pieces), expected_logits(model, tokens), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("plain", [DENSE, MLA], ids=["dense", "mla"])
@torch.inference_mode()
def test_rows_at_different_slots(plain):
    """Row 0 stands at slot 3, row 1 at slot 7: both get what they get alone."""
    model = plain_model(plain)
    decoder, tokens = decoder_of(model), random_tokens(2, LENGTH)
    wanted = expected_logits(model, tokens)[0]
    masks, cis = decoder.positions(LENGTH)
    caches, _ = decoder.new_caches(2, LENGTH, 0)
    decoder.trunk(tokens[:, :8], Span([0, 0], 8, masks, cis), caches)
    part = torch.stack((tokens[0, 3:7], tokens[1, 7:11]))
    got = decoder.logits(decoder.trunk(part, Span([3, 7], 4, masks, cis), caches)[0]).view(2, 4, -1)
    torch.testing.assert_close(got[0].double(), wanted[0, 3:7], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(got[1].double(), wanted[1, 7:11], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("plain", [DENSE, MLA], ids=["dense", "mla"])
@torch.inference_mode()
def test_branches_of_a_tree_do_not_see_each_other(plain):
    """Settled 0..4, then a root with two branches of two: each node equals a plain pass over its own path."""
    model = plain_model(plain)
    decoder, tokens = decoder_of(model), random_tokens(1, 10)
    settled, nodes, parents = tokens[:, :5], tokens[:, 5:], [-1, 0, 0, 1, 2]
    masks, cis = decoder.positions(16)
    caches, _ = decoder.new_caches(1, 16, 0)
    decoder.trunk(settled, Span([0], 5, masks, cis), caches)
    got = decoder.logits(decoder.trunk(nodes, TreeSpan(5, parents, masks, cis), caches)[0])
    for path in ([0, 1, 3], [0, 2, 4]):
        wanted = expected_logits(model, torch.cat((settled, nodes[:, path]), dim=1))[0]
        torch.testing.assert_close(got[path].double(), wanted[0, 5:], rtol=TOLERANCE, atol=TOLERANCE)
    caches[0].keep(6, [7, 9])  # the second branch is accepted: its nodes stand in slots 7 and 9
    caches[1].keep(6, [7, 9])
    after = decoder.logits(decoder.trunk(tokens[:, :1], Span([8], 1, masks, cis), caches)[0])
    wanted = expected_logits(model, torch.cat((settled, nodes[:, [0, 2, 4]], tokens[:, :1]), dim=1))[0]
    torch.testing.assert_close(after.double(), wanted[0, 8:], rtol=TOLERANCE, atol=TOLERANCE)
