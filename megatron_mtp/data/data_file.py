"""Files of a data set, read at any place, and never memory-mapped: on a file system, or in an object store.

A page of a mapped file that was truncated, or that its disk cannot deliver, kills the process with SIGBUS. A read
returns fewer bytes or an error instead, which names the file and lets the run save before it ends.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_mtp.data.files import load_array, stat_file
from megatron_mtp.errors import DataError

logger = logging.getLogger(__name__)
PAUSES_S = (1.0, 5.0, 30.0)
"""Pauses before a read that failed is tried again: the file system of another machine may come back."""


_SAMPLES, _SAMPLE_BYTES = 16, 4096
_CHUNK = 16 << 20  # bytes read at a time where all of a file is read


class DataFile(ABC):
    """A file that is open for reading. Threads may share it.

    Attributes:
        name: path or address.
        size: bytes at opening.
        state: text that is another one if the content may have changed since.
        is_remote: a read may have to wait for an object store, so it is worthwhile to announce it (`will_read`).
    """

    name: str
    size: int
    state: str
    is_remote = False

    @abstractmethod
    def read(self, begin: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `begin` on.

        Raises:
            DataError: the file changed since it was opened, or can no longer be read.
        """

    def array(self, begin: int, count: int, dtype: np.dtype) -> np.ndarray:
        """`count` values from byte `begin` on, [count], read-only."""
        return np.frombuffer(self.read(begin, count * dtype.itemsize), dtype)

    def will_read(self, begin: int, length: int) -> None:  # noqa: B027 -- a local file has nothing to prepare
        """Announces a read, which then takes less time. Returns at once."""

    def sha256(self) -> str:
        """Checksum of the content, in hex."""
        digest = hashlib.sha256()
        for begin in range(0, self.size, _CHUNK):
            self.will_read(begin + _CHUNK, min(_CHUNK, max(0, self.size - begin - _CHUNK)))
            digest.update(self.read(begin, min(_CHUNK, self.size - begin)))
        return digest.hexdigest()


class LocalFile(DataFile):
    """A file on a file system.

    Args:
        remedy: what to do if its content is not as it was at opening, such as "Copy it again."

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, remedy: str):
        self.path, self.name, self._remedy = path, str(path), remedy
        status = stat_file(path)
        self.size, self._changed = status.st_size, status.st_mtime_ns
        self.state = f"{path.resolve()} {self.size} {self._changed}"
        self._fd = _open(path)
        self._has_links = os.fstat(self._fd).st_nlink > 0  # some file systems count none

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, begin: int, length: int) -> bytes:
        for pause_s in (*PAUSES_S, None):
            try:
                return self._read(begin, length)
            except OSError as error:
                if pause_s is None:
                    raise DataError(
                        f"{self.path}: cannot be read any more ({error.strerror}, {1 + len(PAUSES_S)} attempts in "
                        f"{sum(PAUSES_S):.0f} s). Repair its disk or its network, and start the run again."
                    ) from error
                logger.warning("%s: %s; it is read again in %.0f s", self.path, error.strerror, pause_s)
                time.sleep(pause_s)
                self._reopen()
        raise AssertionError("the last attempt returns or raises")

    def _read(self, begin: int, length: int) -> bytes:
        if self._has_links and os.fstat(self._fd).st_nlink == 0:
            raise DataError(f"{self.path}: was deleted while it was in use. {self._remedy}")
        content = os.pread(self._fd, length, begin)
        while len(content) < length:  # one read returns at most 2 GiB
            more = os.pread(self._fd, length - len(content), begin + len(content))
            if not more:
                raise DataError(
                    f"{self.path}: was truncated while it was in use, from {self.size} to {os.fstat(self._fd).st_size} "
                    f"bytes. {self._remedy}"
                )
            content += more
        return content

    def _reopen(self) -> None:
        """Opens the file again, if it is the same: a handle that a file server has forgotten never works again."""
        with suppress(OSError):  # the next read says what is wrong
            fresh = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(fresh)
            if (status.st_size, status.st_mtime_ns) == (self.size, self._changed):
                os.dup2(fresh, self._fd, inheritable=False)
            os.close(fresh)


class StoredTable:
    """The int64 table in a `.npy` file, [rows, columns], read by parts: `table[row, first:last]`.

    Raises:
        DataError: the file is damaged; the text ends with `remedy`.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, remedy: str):
        table = load_array(path, remedy)  # for its header; no page of the map is read
        if table.dtype != np.int64 or table.ndim != 2 or not table.flags.c_contiguous:
            raise DataError(f"{path}: is damaged: it is no table of int64. {remedy}")
        self.shape, self._begin = table.shape, table.offset
        self._file = LocalFile(path, remedy)

    def __getitem__(self, place: tuple[int, slice]) -> np.ndarray:
        row, columns = place
        first, last, _ = columns.indices(self.shape[1])
        begin = self._begin + (row * self.shape[1] + first) * 8
        return self._file.array(begin, max(0, last - first), np.dtype(np.int64))


def sampled_hash(files: Iterable[DataFile]) -> str:
    """A hash of the sizes of files and of blocks that are spread evenly over each.

    It is quick at any size, and the same wherever the files lie. Data that was prepared again from other text has
    another one; not every changed byte is noticed.

    Raises:
        DataError: a file can no longer be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.size}\n".encode())
        length = min(_SAMPLE_BYTES, file.size)
        places = [(file.size - length) * n // (_SAMPLES - 1) for n in range(_SAMPLES)]
        for begin in places:
            file.will_read(begin, length)
        for begin in places:
            digest.update(file.read(begin, length))
    return digest.hexdigest()[:32]


def _open(path: Path) -> int:
    """A file descriptor. Raises this process's limit on open files once it is reached: a blend may have many files."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
