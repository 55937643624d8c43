"""Files of a data set in object storage, read in blocks through a cache on a local disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_mtp.data.block_cache import Block, BlockCache
from megatron_mtp.data.data_file import DataFile, LocalFile
from megatron_mtp.errors import DataError
from megatron_mtp.storage.address import ADDRESS_RULE, is_address
from megatron_mtp.storage.place import place
from megatron_mtp.storage.remote_path import RemotePath

THREADS = 16
"""Downloads at a time in one process: each waits tens of ms for its first byte."""
TOKEN_BLOCK = 256 << 10
"""Bytes of a block of tokens. A random order uses one document of it at a time, so a larger one mostly carries tokens
that are not used before it is deleted; a smaller one saves little time, since most of it is the wait for the first byte
(docs/decisions.md)."""
INDEX_BLOCK = 8 << 20
"""Bytes of a block of an index, which is read from its beginning to its end first."""
READ_AHEAD = 8
"""Blocks of an index that are downloaded with one that is missing."""
SCRATCH_BYTES = 16 << 30
"""Size at most of the cache of a command that has no config; at most half of what is free, too."""


class ObjectCache:
    """Blocks of objects on a local disk, which are downloaded several at a time, each once. Threads may share it.

    Args:
        folder: on a local disk; made if there is none.
        limit: bytes of all blocks.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.blocks = folder, BlockCache(folder, limit)
        self._lock = threading.Lock()
        self._pool, self._running = _new_pool(), dict[Block, Future[bytes]]()

    def start(self, block: Block, download: Callable[[], bytes]) -> Future[bytes]:
        """The content of a block, whose download may have begun already."""
        with self._lock:
            if block not in self._running:
                self._running[block] = self._pool.submit(self._fetch, block, download)
            return self._running[block]

    def close(self) -> None:
        """Gives up the downloads that have not begun, and waits for the others. A later read begins new ones."""
        with self._lock:
            pool, self._pool, self._running = self._pool, _new_pool(), {}
        pool.shutdown(cancel_futures=True)

    def _fetch(self, block: Block, download: Callable[[], bytes]) -> bytes:
        try:
            with self.blocks.turn(block):
                content = self.blocks.read(block, 0, block.size)  # another process may have been faster
                if content is None:
                    content = download()
                    self.blocks.write(block, content)
                return content
        finally:
            with self._lock:
                self._running.pop(block, None)


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="data-download")


class ObjectFile(DataFile):
    """An object. All blocks are of the version that was there when it was opened.

    Args:
        remedy: what to do if it is another one later, such as "Copy it again."
        block_bytes: size of a request, and of what the cache keeps or deletes.
        ahead: blocks to download with one that is missing.

    Raises:
        OSError: there is no such object, or it cannot be read.
    """

    is_remote = True

    def __init__(self, path: RemotePath, remedy: str, cache: ObjectCache, block_bytes: int, ahead: int = 0):
        self.name, self._path, self._remedy = str(path), path, remedy
        self.size, self._version = path.version()
        self.state = f"{self.name} {self.size} {self._version}"
        self._cache, self._block_bytes, self._ahead = cache, block_bytes, ahead
        digest = hashlib.sha256(f"{self.state} {block_bytes}".encode()).hexdigest()
        self._folder = f"{path.name[:80]}-{digest[:24]}"

    def read(self, begin: int, length: int) -> bytes:
        if begin + length > self.size:
            raise DataError(f"{self.name}: holds {self.size} bytes, {begin + length} are needed. {self._remedy}")
        parts = []
        for number in self._numbers(begin, length):
            first = number * self._block_bytes
            low, high = max(begin, first) - first, min(begin + length - first, self._block_bytes)
            part = self._cache.blocks.read(self._block(number), low, high - low)
            if part is None:
                self.will_read(first, max(begin + length - first, (1 + self._ahead) * self._block_bytes))
                part = self._start(number).result()[low:high]
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def will_read(self, begin: int, length: int) -> None:
        for number in self._numbers(begin, length):
            if not self._cache.blocks.holds(self._block(number)):
                self._start(number)

    def _numbers(self, begin: int, length: int) -> range:
        """The blocks that hold these bytes."""
        return range(begin // self._block_bytes, -(-min(begin + length, self.size) // self._block_bytes))

    def _block(self, number: int) -> Block:
        return Block(self._folder, number, min(self._block_bytes, self.size - number * self._block_bytes))

    def _start(self, number: int) -> Future[bytes]:
        block = self._block(number)
        return self._cache.start(block, lambda: self._download(block))

    def _download(self, block: Block) -> bytes:
        """A block, after which the version of the object is compared: all that came was of the one that was opened.

        Raises:
            DataError: the object was replaced or deleted, or cannot be read.
        """
        begin, content = block.number * self._block_bytes, b""
        failure: OSError | None = None
        try:
            content = self._path.read_range(begin, begin + block.size)
        except OSError as error:
            failure = error
        try:
            present = self._path.version()
        except FileNotFoundError as error:
            raise DataError(f"{self.name}: was deleted while it was in use. {self._remedy}") from error
        except OSError as error:
            failure = failure or error
        else:
            if present != (self.size, self._version):
                raise DataError(
                    f"{self.name}: was replaced while it was in use, version {self._version} of {self.size} bytes by "
                    f"version {present[1]} of {present[0]}. {self._remedy}"
                )
        if failure is not None:
            raise DataError(
                f"{self.name}: cannot be read any more ({failure.strerror}), after repeated attempts. Repair the "
                "storage or its network, and start the run again."
            ) from failure
        return content


@contextmanager
def scratch_cache(prefixes: Iterable[str]) -> Iterator[ObjectCache | None]:
    """A cache for one command, in a temporary folder; None: no prefix is an address."""
    if not any(map(is_address, prefixes)):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="megatron-mtp-cache-") as folder:
        limit = min(SCRATCH_BYTES, shutil.disk_usage(folder).free // 2)
        with closing(ObjectCache(Path(folder), limit)) as cache:
            yield cache


def open_file(name: str, remedy: str, cache: ObjectCache | None) -> DataFile:
    """A file of a data set.

    Args:
        name: path or address.
        remedy: what to do if its content is not as it was at opening.
        cache: for addresses.

    Raises:
        DataError: it is an address, and there is no cache.
        ConfigError: it is an address of no known kind, or its driver is not installed.
        OSError: it cannot be opened.
    """
    path = place(name)
    if isinstance(path, Path):
        return LocalFile(path, remedy)
    if cache is None:
        raise DataError(f"{name}: {ADDRESS_RULE}.")
    is_index = name.endswith(".idx")
    return ObjectFile(path, remedy, cache, INDEX_BLOCK if is_index else TOKEN_BLOCK, READ_AHEAD if is_index else 0)
