"""Worker processes: results, errors, and workers that end."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_mtp.device.worker_pool import WorkerError, WorkerPool, worker_pools

pytestmark = pytest.mark.dist


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")


def process_id() -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def pools():
    with worker_pools(timeout_s=60) as pool_of:
        yield pool_of


def test_results_are_in_order_of_rank(pools):
    assert pools(2).run(sum_of_ranks, 10) == [(0, 21), (1, 21)]


def test_an_error_of_a_rank_has_its_traceback_and_the_next_pool_is_new(pools):
    with pytest.raises(WorkerError, match=r"(?s)raise_on_rank_1 failed on rank 1.*ValueError: only here"):
        pools(2).run(raise_on_rank_1)
    assert not pools(2).run(sum_of_ranks, 0)[0][0]


def test_a_killed_worker_is_named(pools):
    victim = psutil.Process(pools(2).run(process_id)[1])
    victim.kill()
    victim.wait(timeout=30)
    with pytest.raises(WorkerError, match="sum_of_ranks: the process of rank 1 ended"):
        pools(2).run(sum_of_ranks, 0)


def test_no_answer_in_time_ends_the_pool():
    with WorkerPool(1, timeout_s=30) as pool:
        pool.timeout_s = 0.2
        with pytest.raises(WorkerError, match=r"sleep: no answer from ranks \[0\] after 0.2 s"):
            pool.run(time.sleep, 5)
        assert not pool.is_open
