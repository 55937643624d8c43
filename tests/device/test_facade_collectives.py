"""The collectives that the facade adapts to gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.dist


def average_and_sum() -> tuple[list[float], list[float]]:
    mean, total = (torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1) for _ in range(2))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=dist.group.WORLD)
    dist.all_reduce(total)
    return mean.tolist(), total.tolist()


def test_all_reduce_averages(ranks):
    assert ranks(2).run(average_and_sum) == [([1.5, 3.0], [3.0, 6.0])] * 2


def asynchronous_average() -> str:
    try:
        dist.all_reduce(torch.ones(1), op=dist.ReduceOp.AVG, async_op=True)
    except NotImplementedError as error:
        return str(error)
    return ""


def test_asynchronous_average_is_refused(ranks):
    assert "average_in_collective" in ranks(2).run(asynchronous_average)[0]


def exchange_with_tensor_sizes() -> list[float]:
    rank = dist.get_rank()
    # rank 0 keeps 1 row and sends 2, rank 1 sends 3 and keeps 0
    send, receive = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
    output = torch.empty(sum(receive))
    dist.all_to_all_single(
        output,
        torch.arange(3.0) + 10 * rank,
        output_split_sizes=torch.tensor(receive),
        input_split_sizes=torch.tensor(send),
        group=dist.group.WORLD,
    )
    return output.tolist()


def test_all_to_all_takes_sizes_as_tensors(ranks):
    assert ranks(2).run(exchange_with_tensor_sizes) == [[0.0, 10.0, 11.0, 12.0], [1.0, 2.0]]


def gather_uneven() -> list[float]:
    mine = torch.full((1 + 2 * dist.get_rank(), 1), float(dist.get_rank()))
    output = torch.full((4, 1), -1.0)
    dist.all_gather(list(output.split([1, 3])), mine, group=dist.group.WORLD)
    return output.flatten().tolist()


def test_parts_of_different_length_are_gathered(ranks):
    assert ranks(2).run(gather_uneven) == [[0.0, 1.0, 1.0, 1.0]] * 2


def scatter_uneven() -> list[float]:
    rank = dist.get_rank()
    whole = torch.arange(4.0)[:, None] + 10 * rank
    output = torch.empty(3 if rank else 1, 1)
    dist.reduce_scatter(output, list(whole.split([1, 3])), group=dist.group.WORLD)
    return output.flatten().tolist()


def test_parts_of_different_length_are_scattered(ranks):
    assert ranks(2).run(scatter_uneven) == [[10.0], [12.0, 14.0, 16.0]]
