"""One rank that cannot read its data must not leave the others waiting in the collectives of a step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
import torch.distributed as dist

from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.data.prefetch import Prefetcher
from megatron_mtp.errors import DataError, LostDataError


def agreed(batches: Prefetcher[GlobalBatch], device: torch.device) -> Generator[GlobalBatch]:
    """The same batches; an error in the data of one rank is raised on every rank. Each batch is a collective.

    Args:
        batches: closed when the generator ends or is closed.
        device: where collectives keep their tensors.

    Raises:
        LostDataError: on every rank, before the same batch: some rank cannot read it.
    """
    with closing(agreed_with(batches, device, tuple)) as pairs:
        for batch, _ in pairs:
            yield batch


def agreed_with(
    batches: Prefetcher[GlobalBatch], device: torch.device, noticed: Callable[[], Sequence[bool]]
) -> Generator[tuple[GlobalBatch, list[bool]]]:
    """As `agreed`, and with each batch what any rank has noticed until then, in the same collective.

    Args:
        noticed: what this rank has noticed, one flag for each question; the same questions on every rank.
    """
    with closing(batches):
        while True:
            problem, batch = "", None
            try:
                batch = next(batches, None)
            except DataError as error:
                problem = str(error)
            flags = torch.tensor([bool(problem), *noticed()], dtype=torch.int, device=device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            has_problem, *found = map(bool, flags.tolist())
            if has_problem:
                raise LostDataError(_problems(problem))
            if batch is None:
                return
            yield batch, found


def _problems(own: str) -> str:
    """The problems of all ranks, each once. A collective."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return "\n".join(dict.fromkeys(problem for problem in found if problem))
