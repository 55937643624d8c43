"""From an exception to an exit code and one message, on one rank or on many.

Several ranks meet the same mistake, and when one rank fails the others soon fail because of it. The user should read the
first cause once: rank 0 speaks; another rank speaks if the mistake is its own. Ranks that `--nproc` started write their
failure to a file for the parent to choose from; ranks of torchrun leave it in torchrun's store for rank 0.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress

from megatron_mtp.errors import ConfigError, MegatronMTPError, NumericsError
from megatron_mtp.observe.failure_file import ENDED_BY_ANOTHER, write_failure

STORE_KEY = f"megatron_mtp/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
SILENCE_S = 20.0
"""A rank beside rank 0 waits this long to be ended before it speaks itself."""
ECHO_WAIT_S = 3.0
"""Rank 0, hit by another rank's end, waits this long for that rank's reason."""
ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistNetworkError",
    "ncclRemoteError",
    ENDED_BY_ANOTHER,
)
"""Texts of failures that another rank's end explains."""
USER_MISTAKE = 2


def exit_code_of(error: Exception) -> int:
    """Reports an exception that ended a command and returns the exit code.

    A MegatronMTPError is addressed to the user: its text, no traceback, its exit code (2 but for bad numbers). Anything else is
    raised again for Python to print, unless this rank's parent collects failures or another rank failed first for a reason it left.
    """
    rank, is_mistake = int(os.environ.get("RANK", "0")), isinstance(error, MegatronMTPError)
    code = error.exit_code if isinstance(error, MegatronMTPError) else 1
    text = message(error) if is_mistake else "".join(traceback.format_exception(error))
    if write_failure(rank, text, is_mistake):
        return code
    if not is_mistake:
        if rank == 0 and (cause := _cause_in_store(error)):
            print(cause, file=sys.stderr, flush=True)
            return USER_MISTAKE
        raise error
    if rank != 0:
        _let_rank_0_speak(f"[rank {rank}] {message(error)}", isinstance(error, ConfigError | NumericsError))
    else:
        print(message(error), file=sys.stderr, flush=True)
    return code


def message(error: Exception) -> str:
    """The text for the user: one line for each problem."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    if len(problems) == 1:
        return f"megatron-mtp: {problems[0]}"
    return "\n".join([f"megatron-mtp: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


def _let_rank_0_speak(text: str, is_shared: bool) -> None:
    """Waits until rank 0 has said it and torchrun ends this rank. Speaks if that does not happen.

    Args:
        is_shared: every rank meets it (a mistake in the config, bad numbers), so that silence is right on all but rank 0.
    """
    if not is_shared and (store := _store()) is not None:
        with suppress(Exception):
            store.set(STORE_KEY, text)
    time.sleep(SILENCE_S)
    if not is_shared:
        print(text, file=sys.stderr, flush=True)


def _cause_in_store(error: Exception) -> str | None:
    """What another rank left in the store as the reason of its end, before this rank failed."""
    is_echo = any(echo in f"{type(error).__name__} {error}" for echo in ECHOES)
    deadline = time.monotonic() + (ECHO_WAIT_S if is_echo else 0.0)
    with suppress(Exception):
        store = _store()
        while store is not None:
            if store.check([STORE_KEY]):
                return store.get(STORE_KEY).decode()
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
    return None


def _store():
    """torchrun's key-value store; None outside torchrun or before torch was imported."""
    if "torch.distributed" not in sys.modules or "MASTER_PORT" not in os.environ:
        return None
    from datetime import timedelta

    from torch.distributed import TCPStore

    with suppress(Exception):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    return None
