"""Coefficients, the total, metrics and acceptance counts against loops and sums written from the definitions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.objective.acceptance import ROWS, acceptance_counts
from megatron_mtp.objective.heads import HeadOutput
from megatron_mtp.objective.metrics import ROUTER_LOSSES, BatchMetrics
from megatron_mtp.objective.objective import Objective, StepObjective, total_coefficients
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


class Group:
    """Rank 0 of a process group that nothing is sent over."""

    def __init__(self, size: int = 1):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def metrics(sums: list[float], counts: list[int], acceptance: torch.Tensor | None = None) -> BatchMetrics:
    if acceptance is None:
        acceptance = torch.zeros(len(ROWS), len(sums), dtype=torch.int64)
    no_losses = torch.zeros(len(ROUTER_LOSSES))
    depth_sums = torch.tensor(sums, dtype=torch.float64)
    return BatchMetrics(depth_sums, torch.tensor(counts), acceptance, no_losses.double(), no_losses.long(), depth_sums)


def test_total_weighs_every_target_of_a_depth_the_same():
    coefficients = total_coefficients(torch.tensor([10, 8, 4]), loss_factor=0.3, depth_weights=[1.0, 0.5])
    sums = [20.0, 24.0, 16.0]
    # L = (2, 3, 4); total = 2 + 0.3 / 2 * (1 * 3 + 0.5 * 4)
    assert float((torch.tensor(sums).double() * coefficients).sum()) == pytest.approx(2 + 0.15 * 5)
    assert metrics(sums, [10, 8, 4]).losses == [2, 3, 4]


def test_a_depth_without_targets_adds_nothing_and_is_reported_as_nan():
    assert total_coefficients(torch.tensor([3, 0]), 0.1, [1.0]).tolist() == [pytest.approx(1 / 3), 0]
    found = metrics([3.0, 0.0], [3, 0])
    assert str(found.losses) == "[1.0, nan]"
    assert found.valid_losses() == {"lm loss": 1.0}


def test_the_loss_function_undoes_the_divisions_of_schedule_and_ddp():
    cfg = get_recipe("tiny_dense")
    cfg.model.mtp_num_layers = 1
    groups = SimpleNamespace(tp=Group(), cp=Group(), dp_cp=Group(2))
    run = Objective.of(resolve(cfg.finalize(1)), groups, torch.device("cpu"))
    counts = torch.tensor([4, 2])
    step = StepObjective(run, counts, total_coefficients(counts, 0.5, [1.0]).float(), num_microbatches=3)
    ids = torch.zeros(2, 1, 4, dtype=torch.int64)
    batch = MicroBatch(ids[0], ids[0], ids[1:], labels=ids, loss_mask=torch.ones(2, 1, 4))
    output = HeadOutput(torch.tensor(3.5), torch.tensor([8.0, 6.0]), ids)
    total, tokens, found = step.loss_function(batch, output, output.total)
    assert float(total) / 3 / 2 == 3.5
    assert int(tokens) == 1
    assert found["sums"].tolist() == [8, 6]
    assert found["acceptance"][0].tolist() == [4, 4]


def test_metrics_of_two_batches_weigh_targets_not_batches():
    counts = torch.tensor([[4, 2], [3, 1], [0, 1], [0, 2], [0, 1]])
    both = metrics([4.0, 8.0], [1, 2], counts) + metrics([6.0, 0.0], [9, 0], counts)
    assert both.losses == [1.0, 4.0]  # not the mean of 4 and 2/3
    assert both.acceptance_by_depth()["valid"] == [4]


def test_acceptance_rates_by_hand():
    #                                   depth 0   1   2
    acceptance = torch.tensor([[10, 8, 4], [5, 2, 0], [10, 4, 3], [10, 8, 4], [10, 4, 1]])
    expected = {"lm/top1_target": 0.5, "mtp_1/top1_target": 0.25, "mtp_1/top1_main": 0.5, "mtp_1/accepted": 0.5}
    expected |= {"mtp_2/top1_target": 0.0, "mtp_2/top1_main": 0.75, "mtp_2/accepted": 0.25}
    expected["mtp/accepted_length"] = 0.5 + 0.5 * 0.25
    assert metrics([0.0] * 3, [10, 8, 4], acceptance).acceptance_rates() == expected
    # Without valid slots there is no rate, and nothing is accepted.
    assert metrics([0.0] * 2, [0, 0]).acceptance_rates() == {"mtp/accepted_length": 0.0}


def test_router_losses_are_sums_over_counts_and_come_after_the_main_loss():
    alone = metrics([2.0, 3.0], [1, 1])
    routed = BatchMetrics(
        *(alone.depth_sums, alone.depth_counts, alone.acceptance),
        router_sums=torch.tensor([6.0, 5.0, 1.0], dtype=torch.float64),
        router_counts=torch.tensor([3, 0, 4]),
        local_sums=alone.local_sums,
    )
    assert routed.router == {"seq_load_balancing_loss": 2.0, "z_loss": 0.25}
    assert list(routed.named_losses()) == ["lm loss", "load_balancing_loss", "z_loss", "mtp_1 loss"]
    assert (routed + routed).router == routed.router


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
    assert torch.equal(acceptance_counts(top1, labels, mask, Group()), expected)
