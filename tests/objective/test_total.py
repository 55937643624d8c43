"""Coefficients, the total and acceptance counts against loops written from the definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.objective.acceptance import ROWS, acceptance_counts
from megatron_mtp.objective.total import StepObjective, coefficients, depth_losses

pytestmark = pytest.mark.unit


class Alone:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_total_weighs_every_target_of_a_depth_the_same():
    counts = torch.tensor([10, 8, 4])
    coef = coefficients(counts, loss_factor=0.3, depth_weights=[1.0, 0.5])
    sums = torch.tensor([20.0, 24.0, 16.0], dtype=torch.float64)
    # L = (2, 3, 4); total = 2 + 0.3 / 2 * (1 * 3 + 0.5 * 4)
    assert float((sums * coef).sum()) == pytest.approx(2 + 0.15 * 5)
    assert depth_losses(sums, counts).tolist() == [2, 3, 4]


def test_a_depth_without_targets_adds_nothing_and_is_logged_as_nan():
    counts = torch.tensor([3, 0])
    assert coefficients(counts, 0.1, None).tolist() == [pytest.approx(1 / 3), 0]
    assert torch.isnan(depth_losses(torch.tensor([3.0, 0.0]), counts)[1])


def test_the_loss_function_undoes_the_divisions_of_schedule_and_ddp():
    objective = StepObjective(
        coefficients(torch.tensor([4, 2]), 0.5, None), torch.tensor([4, 2]), 3, 2, z_loss_coeff=0.1
    )
    total, tokens, log = objective.loss_function(torch.tensor([[8.0, 6.0], [4.0, 2.0]]))
    by_hand = (8 / 4 + 0.5 * 6 / 2) + 0.1 * (4 / 4 + 0.5 * 2 / 2)
    assert float(total) / 3 / 2 == pytest.approx(by_hand)
    assert int(tokens) == 1
    assert log["sums"][0].tolist() == [8, 6]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), depths=st.integers(0, 3), length=st.integers(4, 12), vocab=st.integers(2, 4))
def test_acceptance_counts_equal_a_loop(seed: int, depths: int, length: int, vocab: int):
    generator = torch.Generator().manual_seed(seed)
    shape = (1 + depths, 2, length)
    top1 = torch.randint(0, vocab, shape, generator=generator)
    labels = torch.randint(0, vocab, shape, generator=generator)
    mask = torch.randint(0, 2, shape, generator=generator).float()
    for k in range(depths + 1):
        mask[k, :, length - k :] = 0  # no target beyond the sample
    expected = torch.zeros(len(ROWS), 1 + depths, dtype=torch.int64)
    for k, b, i in itertools.product(range(1 + depths), range(2), range(length)):
        if not mask[k, b, i]:
            continue
        agrees = [i + j < length and bool(top1[j, b, i] == top1[0, b, i + j]) for j in range(k + 1)]
        expected[:, k] += torch.tensor(
            [1, top1[k, b, i] == labels[k, b, i], agrees[k], all(agrees[:k]), all(agrees)], dtype=torch.int64
        )
    assert torch.equal(acceptance_counts(top1, labels, mask, Alone()), expected)
