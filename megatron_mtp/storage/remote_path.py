"""An object, or a folder of objects, with those methods of `pathlib.Path` that object storage can keep.

There is no rename, no append and no lock. A folder exists while an object is in it. An object is there whole or not at
all, and replaces an earlier one of its name at once. Every error is an OSError, as that of a file.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Literal, cast

from megatron_mtp.storage.address import address_text, split_address
from megatron_mtp.storage.connection import PART_BYTES, CutError, StorageError, again, connect, plain_error

_MARKS = ("ETag", "etag", "generation", "created")
"""What drivers call the mark of an object's version; `memory` has the time alone."""
READ_BYTES = 16 << 20
"""Bytes of one request by `open`."""


def _plainly[F: Callable[..., Any]](method: F) -> F:
    """The method, with the driver's errors as OSErrors."""

    @functools.wraps(method)
    def plain(self: RemotePath, *args: Any, **values: Any) -> Any:
        try:
            return method(self, *args, **values)
        except StorageError:
            raise
        except Exception as error:  # drivers share no base of their errors
            raise plain_error(error, str(self)) from error

    return cast(F, plain)


@functools.total_ordering
class RemotePath:
    """An address as a path.

    Args:
        address: such as s3://bucket/run.

    Raises:
        ConfigError: it is of no known kind, or its driver is not installed.
    """

    __slots__ = ("_fs", "_key", "_text")

    def __init__(self, address: object):
        self._fs, self._key = connect(address)
        self._text = address_text(address).removesuffix("/")

    # ---- the name ----

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"RemotePath({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._text == other._text

    def __lt__(self, other: RemotePath) -> bool:
        return self._text < other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._text}/{name}")

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self._text,)

    @property
    def name(self) -> str:
        """The last part."""
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder; of one directly in a bucket, itself."""
        _, parts = split_address(self._text)
        return self if len(parts) <= 2 else RemotePath(self._text.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Beside this one."""
        return RemotePath(f"{self._text.rpartition('/')[0]}/{name}")

    # ---- looking ----

    @_plainly
    def stat(self) -> os.stat_result:
        """Size, kind and time of the last change.

        Raises:
            FileNotFoundError: nothing is there.
        """
        return _as_stat(self._fs.info(self._key))

    @_plainly
    def version(self) -> tuple[int, str]:
        """Size of an object in bytes, and a text that is another one once the object was replaced.

        Raises:
            FileNotFoundError: no object is there.
        """
        info = self._fs.info(self._key)
        if info["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        mark = next((info[key] for key in _MARKS if info.get(key)), "")
        return info["size"], str(mark)

    def exists(self) -> bool:
        """Whether an object or folder is there."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is an object."""
        return self._kind() == stat.S_IFREG

    def is_dir(self) -> bool:
        """Whether objects are in it."""
        return self._kind() == stat.S_IFDIR

    def _kind(self) -> int | None:
        try:
            return stat.S_IFMT(self.stat().st_mode)
        except FileNotFoundError:
            return None

    @_plainly
    def entries(self) -> dict[str, os.stat_result]:
        """What is in a folder, by name, with one request for a thousand of them.

        Raises:
            FileNotFoundError: it has none.
        """
        found = {_last(info["name"]): info for info in self._fs.ls(self._key, detail=True)}
        return {name: _as_stat(info) for name, info in found.items() if name and info["name"].strip("/") != self._at}

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in a folder."""
        return (self / name for name in self.entries())

    @property
    def _at(self) -> str:
        return self._key.strip("/")

    # ---- reading ----

    @_plainly
    def read_bytes(self) -> bytes:
        """A whole object."""
        return bytes(again(lambda: self._fs.cat_file(self._key)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """A whole object as text."""
        return self.read_bytes().decode(encoding)

    @_plainly
    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` of an object that has them."""

        def read() -> bytes:
            data = bytes(self._fs.cat_file(self._key, start=start, end=end))
            if len(data) != end - start:
                raise CutError(f"{len(data)} of {end - start} bytes arrived")
            return data

        return again(read)

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """An object to read, from any place."""
        assert mode == "rb", "objects are written by `upload` or `write_bytes`"
        return io.BufferedReader(_Reader(self, self.stat().st_size), READ_BYTES)

    # ---- writing ----

    @_plainly
    def write_bytes(self, data: bytes) -> None:
        """Writes a whole object, in place of one that is there."""
        self._fs.pipe_file(self._key, data)

    @_plainly
    def create(self, data: bytes) -> None:
        """Writes a whole object where none is.

        Raises:
            FileExistsError: there is one.
        """
        self._fs.pipe_file(self._key, data, mode="create")

    @contextmanager
    def upload(self) -> Iterator[io.RawIOBase]:
        """A stream for the bytes of an object, which is there once the block has ended without an exception."""
        stream = _Writer(self)
        try:
            yield stream
        except BaseException:  # whatever it was, the object is not complete
            stream.discard()
            raise
        stream.finish()

    @_plainly
    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        if not missing_ok or self.is_file():
            self._fs.rm_file(self._key)

    @_plainly
    def remove_tree(self, but: str | None = None) -> None:
        """Removes all that is in a folder, but one file in it."""
        kept = None if but is None else (self / but)._at
        if found := [name for name in self._fs.find(self._key) if name.strip("/") != kept]:
            self._fs.rm(found)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object, and buckets are made by their owners."""


class _Reader(io.RawIOBase):
    """The bytes of an object, each range by a request of its own, so that one that breaks off is repeated."""

    def __init__(self, path: RemotePath, size: int):
        self._path, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        data = self._path.read_range(self._position, end)
        view[: len(data)] = data
        self._position = end
        return len(data)

    def readall(self) -> bytes:
        """All that is left, by large requests: the base class makes them of 8 KiB."""
        parts = []
        while self._position < self._size:
            end = min(self._position + READ_BYTES, self._size)
            parts.append(self._path.read_range(self._position, end))
            self._position = end
        return b"".join(parts)


class _Writer(io.RawIOBase):
    """A driver's stream that becomes an object when it is finished, and none when it is discarded."""

    def __init__(self, path: RemotePath):
        self._path = path
        self._stream = self._call(lambda: path._fs.open(path._key, "wb", block_size=PART_BYTES))

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._call(lambda: self._stream.write(data))
        return size

    def finish(self) -> None:
        """Writes the last part; the object is there."""
        try:
            self._call(self._stream.close)
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        """Gives up the parts that were written. Errors are ignored: the object is not there in any case."""
        with suppress(Exception):  # drivers share no base of their errors, and the first error is the one to report
            self._stream.discard()
        with suppress(AttributeError):  # closed, or its destructor would make an object of the parts that it has
            self._stream.closed = True

    def _call(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # drivers share no base of their errors
            raise plain_error(error, str(self._path)) from error


def all_at_once[T, R](act: Callable[[T], R], items: list[T]) -> list[R]:
    """`act` of each item, sixteen at a time: each waits for a server, and none for the processor."""
    with ThreadPoolExecutor(16, thread_name_prefix="storage") as pool:
        return list(pool.map(act, items))


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _as_stat(info: dict[str, Any]) -> os.stat_result:
    kind = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
    changed = next((info[key] for key in ("LastModified", "last_modified", "mtime", "created") if info.get(key)), None)
    changed_s = changed.timestamp() if isinstance(changed, datetime) else 0.0
    return os.stat_result((kind, 0, 0, 1, 0, 0, info["size"] or 0, changed_s, changed_s, changed_s))
