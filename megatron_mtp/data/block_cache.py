"""Blocks of objects of an object store in a local folder of bounded size, which the processes of a machine share.

A block is one file, which appears complete under its name or not at all. The name of its folder holds the version of
the object, so blocks of an object that was replaced are never found. The blocks that were used longest ago are deleted
first. A file with the sum of all blocks, which is locked while it changes, keeps all processes within the limit; only
blocks that are being written come on top.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_mtp.errors import DataError

logger = logging.getLogger(__name__)
TOUCH_S = 10.0
"""A block's time of use is renewed at most this often: to write it at every read would be slow."""
KEPT = 0.9
"""Share of the limit that is left after blocks were deleted, so that not every new block has to look for old ones."""
MIN_BLOCKS = 16
"""A cache on a full disk that holds fewer blocks is of no use."""
STALE_S = 3600.0
"""Age at which a temporary file is taken to be that of a process that was killed."""
_LOCKS = 256
_SUM = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Block:
    """A part of an object.

    Args:
        folder: name of the folder of the object, in this version, in the cache.
        number: counted from the beginning of the object.
        size: bytes.
    """

    folder: str
    number: int
    size: int


class BlockCache:
    """The cache in one folder. Threads may share it.

    Args:
        folder: made if there is none.
        limit: bytes of all blocks.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        with self._sum() as file:
            if not file.read(1) or self._read_sum(file) > limit:
                self._write_sum(file, self._delete_down_to(limit))

    def read(self, block: Block, begin: int, length: int) -> bytes | None:
        """Bytes [begin, begin + length) of a block; None: it is not here."""
        path = self._path(block)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            content = os.pread(fd, length, begin) if status.st_size == block.size else b""
            if len(content) == length:
                if abs(time.time() - status.st_mtime) > TOUCH_S:
                    os.utime(fd)
                return content
            problem = f"holds {status.st_size} bytes instead of {block.size}"
        except OSError as error:
            problem = str(error.strerror)
        finally:
            os.close(fd)
        logger.warning("%s: is damaged (%s); the block is downloaded again", path, problem)
        with suppress(OSError):
            path.unlink()
        return None

    def holds(self, block: Block) -> bool:
        """Whether a block is here."""
        return self._path(block).exists()

    def write(self, block: Block, content: bytes) -> None:
        """Adds a block, and deletes old ones where the limit asks for it. A full disk makes the cache smaller.

        Raises:
            DataError: the folder cannot be written, or its disk has no room for a few blocks.
        """
        path, limit = self._path(block), self.limit
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive its content in a power failure
            with self._sum() as file:
                used = self._read_sum(file)
                if used + len(content) > self.limit:
                    used = self._delete_down_to(max(0, int(self.limit * KEPT) - len(content)))
                temporary.replace(path)
                self._write_sum(file, used + len(content))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self._unusable(error) from error
            self._shrink(len(content), limit, error)
        finally:
            with suppress(OSError):
                temporary.unlink()

    @contextmanager
    def turn(self, block: Block) -> Iterator[None]:
        """While one process downloads a block, others that want it wait here, where the file system has locks."""
        number = zlib.crc32(f"{block.folder} {block.number}".encode()) % _LOCKS
        with self._locked(f"locks/{number:02x}"):
            yield

    def _path(self, block: Block) -> Path:
        return self.folder / "blocks" / block.folder / f"{block.number:08x}"

    def _shrink(self, block_bytes: int, limit: int, error: OSError) -> None:
        """Makes room on a full disk, unless another thread has since the limit was `limit`, or another process."""
        with self._sum() as file:
            has_room = error.errno == errno.ENOSPC and shutil.disk_usage(self.folder).free >= MIN_BLOCKS * block_bytes
            if has_room or self.limit < limit:
                return
            used = self._delete_down_to(self.limit)
            self.limit = int(used * KEPT)
            if self.limit < MIN_BLOCKS * block_bytes:
                raise DataError(
                    f"dataset.object_storage_cache_path = {str(self.folder)!r}: {error.strerror}, and the cache holds "
                    f"no more than {used / 2**20:.1f} MiB. Make room, or name a folder on another disk."
                ) from error
            self._write_sum(file, self._delete_down_to(self.limit))
        logger.warning(
            "%s: %s. The cache of object storage is limited to %.2f GiB from here on. Make room, or lower "
            "dataset.object_storage_cache_gib.",
            self.folder,
            error.strerror,
            self.limit / 2**30,
        )

    def _delete_down_to(self, most: int) -> int:
        """Deletes the blocks that were used longest ago, and what killed processes left; returns the bytes of all."""
        found, now = [], time.time()
        (self.folder / "blocks").mkdir(exist_ok=True)
        for folder in os.scandir(self.folder / "blocks"):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.startswith("."):
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif now - status.st_mtime > STALE_S:
                        os.unlink(entry.path)
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    @contextmanager
    def _sum(self) -> Iterator[IO[bytes]]:
        """The file with the bytes of all blocks, locked."""
        with self._locked("used_bytes") as file:
            yield file

    @staticmethod
    def _read_sum(file: IO[bytes]) -> int:
        file.seek(0)
        content = file.read(_SUM.size)
        return int(_SUM.unpack(content)[0]) if len(content) == _SUM.size else 0

    @staticmethod
    def _write_sum(file: IO[bytes], used: int) -> None:
        file.seek(0)
        file.write(_SUM.pack(used))
        file.flush()

    @contextmanager
    def _locked(self, name: str) -> Iterator[IO[bytes]]:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        except OSError as error:
            raise self._unusable(error) from error
        with file:
            with suppress(OSError):  # without locks, the sum may be wrong for a while
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"dataset.object_storage_cache_path = {str(self.folder)!r}: cannot be written ({error.strerror}). Name a "
            "folder on a local disk that every process of the machine can write."
        )
