"""Caches after any sequence of acceptances hold what a fresh pass over the text would put there."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_mtp.decode.session import Session
from tests.decode.models import DENSE, MLA, VARIANTS, decoder_of, plain_model

pytestmark = pytest.mark.unit

MODELS = {
    "dense": plain_model(DENSE).double(),
    "mla": plain_model(MLA).double(),
    "one_depth": plain_model(replace(DENSE, num_depths=1)).double(),
    "parallel": plain_model(VARIANTS["parallel"]).double(),
    "pre_final_norm": plain_model(VARIANTS["pre_final_norm"]).double(),
}
ROUNDS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=3, max_size=3)), min_size=1, max_size=6
)


@torch.no_grad()
def reference(model, text, depth):
    """Logits [v] of `depth` at the slot that predicts the token after `text`; later depths use the last layer.

    Slot i of depth k reads text[i+k], so that the text ends the sequence of ids that the depth reads.
    """
    slots = len(text) - depth
    inputs = [torch.tensor([text[k : k + slots]]) for k in range(depth + 1)]
    longer = model
    if depth > len(model.mtp):  # the last layer again
        longer = type(model)(replace(model.cfg, num_depths=depth)).double()
        longer.embedding, longer.layers, longer.final_norm, longer.head = (
            model.embedding,
            model.layers,
            model.final_norm,
            model.head,
        )
        longer.mtp = torch.nn.ModuleList([*model.mtp] + [model.mtp[-1]] * (depth - len(model.mtp)))
    used = inputs + [inputs[-1]] * (longer.cfg.num_depths - depth)
    return model.logits(longer.hidden_states(used)[depth][0, -1:], depth)[0]


@pytest.mark.parametrize("name", MODELS)
@given(rounds=ROUNDS, lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_any_acceptances(name, rounds, lengths, seed):
    """Drafts and following tokens are random; how many are accepted is given, not computed."""
    model = MODELS[name]
    decoder = decoder_of(model)
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 50, (n,), generator=generator).tolist() for n in lengths]
    with torch.inference_mode():
        session = Session(decoder, texts, 40, 3)
        check(session.prefill(), [reference(model, text, 0) for text in texts])
        first = torch.randint(0, 50, (len(texts),), generator=generator).tolist()
        session.append(first)
        texts = [[*text, token] for text, token in zip(texts, first, strict=True)]
        for count, kept in rounds:
            drafts = torch.randint(0, 50, (len(texts), count), generator=generator)
            draft_and_check(session, model, texts, drafts)
            logits = session.verify(count)
            for row, text in enumerate(texts):
                expected = [reference(model, text + drafts[row, :k].tolist(), 0) for k in range(count + 1)]
                check(logits[row], expected)
            kept = [min(count, number) for number in kept[: len(texts)]]
            following = torch.randint(0, 50, (len(texts),), generator=generator).tolist()
            session.commit(count, kept, following)
            texts = [[*text, *drafts[row, : kept[row]].tolist(), following[row]] for row, text in enumerate(texts)]


def draft_and_check(session, model, texts, drafts):
    """Runs the drafter along the given drafts and holds the logits of each depth against the reference."""
    seen = []

    def pick(logits):
        seen.append(logits.clone())
        return drafts[:, len(seen) - 1]

    if drafts.shape[1]:
        session.draft(drafts.shape[1], pick)
    for k, logits in enumerate(seen, start=1):
        for row, text in enumerate(texts):
            check(logits[row], reference(model, text + drafts[row, : k - 1].tolist(), k))


def check(got, wanted):
    wanted = torch.stack(wanted) if isinstance(wanted, list) else wanted
    torch.testing.assert_close(got.double(), wanted, rtol=3e-5, atol=3e-5)
