"""One rank that cannot read its data must not leave the others waiting in the collectives of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
import torch.distributed as dist

from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.data.prefetch import Prefetcher
from megatron_mtp.errors import DataError, LostDataError

MAX_WAIT_US = 2**31 - 1
"""What fits the collective's int32: 36 minutes."""


def agreed(batches: Prefetcher[GlobalBatch], device: torch.device) -> Generator[tuple[GlobalBatch, float]]:
    """The same batches; an error in the data of one rank is raised on every rank. Each batch is a collective.

    Args:
        batches: closed when the generator ends or is closed.
        device: where collectives keep their tensors.

    Yields:
        (batch, seconds that the slowest rank waited until it had its part of it).

    Raises:
        LostDataError: on every rank, before the same batch: some rank cannot read it.
    """
    with closing(_agreed(batches, device, tuple)) as found:
        for batch, _, wait_s in found:
            yield batch, wait_s


def agreed_with(
    batches: Prefetcher[GlobalBatch], device: torch.device, noticed: Callable[[], Sequence[bool]]
) -> Generator[tuple[GlobalBatch, list[bool]]]:
    """As `agreed`, and with each batch what any rank has noticed until then, in the same collective.

    Args:
        noticed: what this rank has noticed, one flag for each question; the same questions on every rank.
    """
    with closing(_agreed(batches, device, noticed)) as found:
        for batch, flags, _ in found:
            yield batch, flags


def _agreed(
    batches: Prefetcher[GlobalBatch], device: torch.device, noticed: Callable[[], Sequence[bool]]
) -> Generator[tuple[GlobalBatch, list[bool], float]]:
    with closing(batches):
        while True:
            problem, batch, began = "", None, time.perf_counter()
            try:
                batch = next(batches, None)
            except DataError as error:
                problem = str(error)
            wait_us = min(int((time.perf_counter() - began) * 1e6), MAX_WAIT_US)
            flags = torch.tensor([wait_us, bool(problem), *noticed()], dtype=torch.int, device=device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            wait_us, *flag_values = flags.tolist()
            has_problem, *found = map(bool, flag_values)
            if has_problem:
                raise LostDataError(_problems(problem))
            if batch is None:
                return
            yield batch, found, wait_us / 1e6


def _problems(own: str) -> str:
    """The problems of all ranks, each once. A collective."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return "\n".join(dict.fromkeys(problem for problem in found if problem))
