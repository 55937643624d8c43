"""Files that several processes share: written atomically, and built by one process while the others wait."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from megatron_mtp.errors import DataError

logger = logging.getLogger(__name__)
_POLL_S = 0.2
_SAY_AFTER_S = 10.0


def stat_file(path: Path) -> os.stat_result:
    """Status of a regular file.

    Raises:
        OSError: there is none. A reader of a pipe or a device might never come to its end.
    """
    try:
        status = path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, "its name holds a NUL character", str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return status


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Writes a file that never exists half written, even after a power failure. For `scratch` see `replacing`."""
    with replacing(path, scratch) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` if the block succeeds.

    Args:
        scratch: folder of the temporary file, on the file system of `path`; None: that of `path`. A killed process
            leaves the temporary file there.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_array(path: Path, build: Callable[[], np.ndarray]) -> None:
    """Makes the `.npy` file `path` if there is none. The first process builds it and the others wait for the file.

    No process waits in a collective. If the builder dies, its lock is released and another process takes over. On a
    file system without locks, several processes may build the same array; the file is always complete.

    Raises:
        OSError: the folder cannot be written.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        _wait_for_turn(lock, path)
        if not path.exists():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, build())


def load_array(path: Path, remedy: str) -> np.memmap:
    """The array in a `.npy` file, memory-mapped.

    Raises:
        DataError: the file is damaged; the text ends with `remedy`.
        OSError: it cannot be read.
    """
    stat_file(path)
    try:
        loaded = np.load(path, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python source, which fails in many ways
        raise DataError(f"{path}: is damaged ({error}). {remedy}") from error
    if not isinstance(loaded, np.memmap):
        raise DataError(f"{path}: is damaged (it is an archive). {remedy}")
    return loaded


def _wait_for_turn(lock: IO[str], path: Path) -> None:
    """Returns when `path` exists or this process holds the lock."""
    began = said = time.monotonic()
    while not path.exists():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_S)
        except OSError as error:
            logger.debug("no file locks for %s (%s): building without", path, error)
            return
        if time.monotonic() - said > _SAY_AFTER_S:
            said = time.monotonic()
            logger.info("waiting for another process to build %s (%.0f s)", path, said - began)
