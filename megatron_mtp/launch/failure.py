"""Turns an exception into one message and an exit code, on one rank or on many.

Several ranks often meet the same mistake, and when one rank fails the others soon fail because of it. The user should
see the first cause once: rank 0 reports it; another rank reports only a mistake that is its own. Ranks started by
`--nproc` write their failure to a file from which the parent process chooses; ranks of torchrun leave it in torchrun's
store for rank 0.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from megatron_mtp.errors import MegatronMTPError, ProblemsError
from megatron_mtp.observe.failure_file import Failure

if TYPE_CHECKING:
    from torch.distributed import TCPStore

STORE_KEY = f"megatron_mtp/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
SILENCE_S = 20.0
"""A rank other than 0 waits this long to be ended before it reports its own failure."""
ECHO_WAIT_S = 3.0
"""Rank 0, hit by another rank's end, waits this long for that rank's reason."""
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistNetworkError",
    "ncclRemoteError",
)
"""How gloo and NCCL report that another rank ended. They raise plain RuntimeErrors, so only their text tells."""
USER_MISTAKE = 2


def exit_code_of(error: Exception) -> int:
    """Reports an exception that ended a command and returns the exit code.

    A MegatronMTPError is addressed to the user: only its text is printed, and the code is its own (2 by default). Any
    other exception is raised again for Python to print, unless this rank's parent collects failures or another rank
    failed first and left its reason.
    """
    rank, mistake = int(os.environ.get("RANK", "0")), error if isinstance(error, MegatronMTPError) else None
    code = mistake.exit_code if mistake else 1
    text = message(error) if mistake else "".join(traceback.format_exception(error))
    if Failure(rank, text, "mistake" if mistake else "echo" if is_echo(error) else "crash").write():
        return code
    if mistake is None:
        if rank == 0 and (cause := _cause_in_store(error)):
            print(cause, file=sys.stderr, flush=True)
            return USER_MISTAKE
        raise error
    if rank != 0:
        _let_rank_0_report(f"[rank {rank}] {text}", mistake.is_shared)
    else:
        print(text, file=sys.stderr, flush=True)
    return code


def message(error: Exception) -> str:
    """The text for the user: one line for each problem."""
    problems = error.problems if isinstance(error, ProblemsError) else [str(error)]
    if len(problems) == 1:
        return f"megatron-mtp: {problems[0]}"
    return "\n".join([f"megatron-mtp: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


def is_echo(error: BaseException) -> bool:
    """Whether another rank's end explains this failure, or one that led to it."""
    return any(text in f"{type(one).__name__} {one}" for one in _chain(error) for text in LOST_PEER)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _let_rank_0_report(text: str, is_shared: bool) -> None:
    """Waits for rank 0 to report the mistake and torchrun to end this rank; else reports it itself.

    Args:
        is_shared: every rank meets it, so all ranks but 0 stay silent.
    """
    if not is_shared and (store := _store()) is not None:
        with suppress(Exception):
            store.set(STORE_KEY, text)
    time.sleep(SILENCE_S)
    if not is_shared:
        print(text, file=sys.stderr, flush=True)


def _cause_in_store(error: Exception) -> str | None:
    """The reason that another rank left in the store before this rank failed."""
    deadline = time.monotonic() + (ECHO_WAIT_S if is_echo(error) else 0.0)
    with suppress(Exception):
        store = _store()
        while store is not None:
            if store.check([STORE_KEY]):
                return store.get(STORE_KEY).decode()
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
    return None


def _store() -> TCPStore | None:
    """torchrun's key-value store; None outside torchrun or before torch was imported."""
    if "torch.distributed" not in sys.modules or "MASTER_PORT" not in os.environ:
        return None
    from datetime import timedelta

    from torch.distributed import TCPStore

    with suppress(Exception):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    return None
