"""The folder of unfinished work of `prepare`, which one process at a time may use, and errors of writing."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mtp.data.files import write_atomically
from megatron_mtp.data.lock import Lock
from megatron_mtp.errors import DataError, InUseError

LOCK_NAME = "lock"
_OWN_NAMES = re.compile(r"lock|plan|tokenizer\.json|(input|shard)_\d+\..+|\..+")  # in the work folder; NFS adds .nfs...
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns an error of the file system into a message that names the option and what to do."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        remedy = (
            "Make room and run the same command again: finished work is kept."
            if error.errno in _NO_ROOM or error.errno is None  # numpy's short writes have no number
            else "Choose another place, or make its folder writable."
        )
        raise DataError(f"{option} {path}: cannot be written: {error.strerror or error}{where}. {remedy}") from error


def work_path(output: Path) -> Path:
    """The folder of unfinished work of an output."""
    return output.with_name(f"{output.name}.prepare")


@contextmanager
def work_folder(output: Path, plan: str) -> Iterator[Path]:
    """The folder of unfinished work, emptied first if it belongs to another plan, and removed if the block succeeds."""
    work = work_path(output)
    work.mkdir(parents=True, exist_ok=True)
    if other := _others_files(work):
        raise DataError(f"{work}: is not a work folder of `prepare`: it holds {other[0]}. Choose another --output.")
    lock = Lock(work / LOCK_NAME, f"--output {output}")
    for _ in lock.take(patience_s=0):
        pass
    try:
        if _plan_of(work) != plan:
            for path in work.iterdir():
                if path.name != LOCK_NAME:
                    path.unlink()
            write_atomically(work / "plan", plan.encode())
        yield work
        shutil.rmtree(work)
    finally:
        lock.release()


def _others_files(work: Path) -> list[str]:
    """Names in a work folder that `prepare` did not write."""
    return sorted(path.name for path in work.iterdir() if not (_OWN_NAMES.fullmatch(path.name) and path.is_file()))


def _plan_of(work: Path) -> str | None:
    """The plan of the unfinished work; None if there is none."""
    try:
        return (work / "plan").read_text(errors="replace")
    except FileNotFoundError:
        return None


def remove_finished_work(output: Path, plan: str) -> None:
    """Removes the work folder that a run left which was killed after its last move."""
    work = work_path(output)
    with suppress(OSError, InUseError):  # it is in use, or this user may not write
        if not _others_files(work) and _plan_of(work) in (None, plan):
            lock = Lock(work / LOCK_NAME, str(work))
            if next(lock.take(patience_s=0), None) is None:
                shutil.rmtree(work)
            lock.release()
