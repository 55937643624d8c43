"""Files that several processes share: written whole or not at all, built by one while the others wait for the file."""

from __future__ import annotations

import fcntl
import logging
import os
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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written, not even after a power cut."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place if the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_array(path: Path, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the `.npy` file `path`, memory-mapped; the first process to come builds it, the others wait for it.

    No process waits in a collective. A builder that dies frees its lock and another takes over. Where the file system
    has no locks, several may build the same array; each file that appears is whole.

    Raises:
        OSError: the folder cannot be written.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".{path.name}.lock").open("a") as lock:
            _wait_for_turn(lock, path)
            if not path.exists():
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, build())
    try:
        loaded: np.ndarray = np.load(path, mmap_mode="r")
        return loaded
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: is a damaged index ({error}). Delete it; it will be built again.") from error


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
