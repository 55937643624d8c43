"""The plain model's objective against loops written out from the definition, one slot and one depth at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference.plain_model import PlainConfig, PlainMTPModel, combine, depth_view

pytestmark = pytest.mark.unit

TINY = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "vocab_size": 11, "ffn_size": 12}


def view_by_loops(tokens: list[int], base_mask: list[int], documents: list[int] | None, depth: int):
    """(inputs, labels, valid) of one sample, slot by slot."""
    s = len(tokens) - 1
    inputs, labels, valid = [], [], []
    for i in range(s):
        inputs.append(tokens[i + depth] if i + depth <= s else 0)
        labels.append(tokens[i + depth + 1] if i + depth + 1 <= s else 0)
        exists = i + depth + 1 <= s
        counts = exists and bool(base_mask[i + depth])
        if counts and documents is not None:
            counts = all(documents[j] == documents[i] for j in range(i, i + depth + 2))
        valid.append(counts)
    return inputs, labels, valid


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_views_equal_loops(data):
    s = data.draw(st.integers(1, 9))
    depth = data.draw(st.integers(0, s + 2))
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=s + 1, max_size=s + 1))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=s, max_size=s))
    starts = data.draw(st.none() | st.lists(st.booleans(), min_size=s + 1, max_size=s + 1))
    documents = None if starts is None else [sum(starts[: j + 1]) for j in range(s + 1)]

    segment_ids = None if documents is None else torch.tensor([documents])
    view = depth_view(torch.tensor([tokens]), torch.tensor([mask]), segment_ids, depth)
    inputs, labels, valid = view_by_loops(tokens, mask, documents, depth)
    assert view.inputs.tolist() == [inputs]
    assert view.labels.tolist() == [labels]
    assert view.valid.tolist() == [valid]


def test_worked_example():
    # Two documents, a b c | d e, and a hole: the target c (slot 1 at depth 0) does not count at any depth.
    tokens, mask, documents = (
        torch.tensor([[1, 2, 3, 4, 5]]),
        torch.tensor([[1, 0, 1, 1]]),
        torch.tensor([[0, 0, 0, 1]]),
    )
    assert depth_view(tokens, mask, documents, 0).valid.tolist() == [[True, False, False, True]]
    assert depth_view(tokens, mask, documents, 1).valid.tolist() == [[False, False, False, False]]
    assert depth_view(tokens, mask, None, 1).valid.tolist() == [[False, True, True, False]]


def micro_batches(seed: int, masks: list[Tensor]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"tokens": torch.randint(0, 11, (m.shape[0], m.shape[1] + 1), generator=generator), "base_mask": m}
        for m in masks
    ]


def test_total_equals_loops_over_targets():
    cfg = PlainConfig(**TINY, num_depths=2, mtp_lambda=0.3, mtp_weights=(1.0, 0.5))
    model = PlainMTPModel(cfg).double()
    masks = [torch.ones(2, 6), torch.zeros(2, 6), torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]])]
    batches = micro_batches(0, masks)
    outputs = [model(**batch) for batch in batches]
    totals = combine(outputs)

    for depth in range(3):
        total, count = 0.0, 0
        for batch, output in zip(batches, outputs, strict=True):
            for row in range(2):
                for i in range(6 - depth):
                    if batch["base_mask"][row, i + depth]:
                        logits = output.logits[depth][row, i].tolist()
                        target = batch["tokens"][row, i + depth + 1]
                        total += math.log(sum(math.exp(z) for z in logits)) - logits[target]
                        count += 1
        assert totals.counts[depth] == count
        assert totals.losses[depth].item() == pytest.approx(total / count, rel=1e-13)
    expected = totals.losses[0] + 0.3 / 2 * (totals.losses[1] + 0.5 * totals.losses[2])
    assert totals.total.item() == pytest.approx(expected.item(), rel=1e-14)


def test_how_samples_are_grouped_does_not_matter():
    cfg = PlainConfig(**TINY, num_depths=2)
    model = PlainMTPModel(cfg).double()
    [whole] = micro_batches(1, [(torch.arange(24).reshape(4, 6) % 5 != 0).long()])
    singles = [{name: tensor[row : row + 1] for name, tensor in whole.items()} for row in range(4)]
    together, apart = model.global_batch([whole]), model.global_batch(singles)
    torch.testing.assert_close(apart.losses, together.losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(apart.total, together.total, rtol=1e-14, atol=0)


def test_a_depth_without_targets_has_the_loss_zero():
    model = PlainMTPModel(PlainConfig(**TINY, num_depths=3)).double()
    output = model(torch.tensor([[1, 2, 3]]))  # two slots: depths 2 and 3 have no target
    assert output.counts.tolist() == [2, 1, 0, 0]
    assert output.losses[2:].tolist() == [0.0, 0.0]
    output.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_of_the_vocabulary_takes_no_part():
    cfg = PlainConfig(**TINY, num_depths=1)
    padded_cfg = PlainConfig(**TINY, num_depths=1, padded_vocab_size=16)
    model, padded = PlainMTPModel(cfg).double(), PlainMTPModel(padded_cfg, seed=1).double()
    weights = model.state_dict()
    for name in ("embedding.weight", "head.weight"):
        weights[name] = torch.cat((weights[name], padded.state_dict()[name][11:]))
    padded.load_state_dict(weights)
    tokens = torch.arange(14).reshape(2, 7) % 11
    assert padded(tokens).total.item() == model(tokens).total.item()


def test_zero_weights_of_depths_leave_the_main_loss():
    tokens = torch.arange(14).reshape(2, 7) % 11
    output = PlainMTPModel(PlainConfig(**TINY, num_depths=2, mtp_lambda=0.0)).double()(tokens)
    assert output.total.item() == output.losses[0].item()


def test_logit_z_loss_is_weighted_as_its_depth():
    tokens = torch.arange(14).reshape(2, 7) % 11
    cfg = PlainConfig(**TINY, num_depths=2, mtp_lambda=0.3, mtp_weights=(1.0, 0.5), logits_z_coeff=0.01)
    output = PlainMTPModel(cfg).double()(tokens)
    squares = [(torch.logsumexp(z, -1) ** 2)[:, : 6 - k].mean() for k, z in enumerate(output.logits)]
    without = output.losses[0] + 0.15 * output.losses[1] + 0.075 * output.losses[2]
    expected = without + 0.01 * (squares[0] + 0.15 * squares[1] + 0.075 * squares[2])
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-14)


def test_acceptance_equals_loops():
    # A vocabulary of three, so that top-1 ids agree often by chance.
    model = PlainMTPModel(PlainConfig(**TINY | {"vocab_size": 3}, num_depths=3), seed=4).double()
    tokens = torch.randint(0, 3, (3, 13), generator=torch.Generator().manual_seed(6))
    base_mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(7)) < 0.8
    output = model(tokens, base_mask)
    top1 = output.top1.tolist()

    expected = [[0] * 4 for _ in range(5)]
    for depth in range(4):
        for row in range(3):
            for i in range(12 - depth):
                if not base_mask[row, i + depth]:
                    continue
                agrees = [top1[j][row][i] == top1[0][row][i + j] for j in range(depth + 1)]
                target = tokens[row, i + depth + 1]
                answers = (True, top1[depth][row][i] == target, agrees[depth], all(agrees[:depth]), all(agrees))
                for question, answer in enumerate(answers):
                    expected[question][depth] += int(answer)
    assert output.acceptance.tolist() == expected
    assert 0 < expected[4][3] < expected[3][3] < expected[0][3]
