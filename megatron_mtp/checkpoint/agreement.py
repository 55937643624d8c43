"""Small collectives that give all ranks the same answer, errors included: a rank that raises alone leaves the others
waiting. Every function must be called by all ranks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_mtp.errors import CheckpointError, InUseError
from megatron_mtp.storage.connection import StorageError

logger = logging.getLogger(__name__)


def run_on_rank_0[T](produce: Callable[[], T]) -> T:
    """The result of rank 0, on every rank.

    Raises:
        InUseError, CheckpointError: on every rank, whatever `produce` raised on rank 0.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = produce()
        except (CheckpointError, InUseError) as error:
            found[1] = error
        except StorageError as error:
            found[1] = CheckpointError(str(error))
        except Exception as error:
            logger.exception("unexpected error")
            found[1] = CheckpointError(describe_error(error))
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def gather_lists[T](items: list[T]) -> list[T]:
    """The items of all ranks in order of rank, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return [item for one in everyone for item in one]


def raise_any(error: CheckpointError | None) -> None:
    """Raises the first error of any rank, on every rank."""
    if errors := gather_lists([] if error is None else [error]):
        raise errors[0]


def first_value_of_any_rank(values: dict[str, Any]) -> dict[str, Any]:
    """Each value from the first rank that has it; a rank that holds no parameter has none."""
    everyone = gather_lists([values])
    return {name: next((one[name] for one in everyone if one[name] is not None), None) for name in values}


def describe_error(error: BaseException) -> str:
    """An exception in a few words: the text of the operating system for an OSError, a CheckpointError as it is."""
    if isinstance(error, CheckpointException):
        return describe_error(next(iter(error.failures.values()))[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "weights_only" in str(error):  # torch's text recommends loading it without restrictions
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it names {found[1]}" if found else type(error).__name__
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
