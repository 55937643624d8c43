"""Files and objects in one form: a `Path`, or a `RemotePath` behind an address."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mtp.storage.address import is_address
from megatron_mtp.storage.remote_path import RemotePath

Place = Path | RemotePath


def place(path: str | Path | RemotePath) -> Place:
    """A path on this machine, or an address.

    Raises:
        ConfigError: it is an address of no known kind, or its driver is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    return RemotePath(path) if is_address(path) else Path(path)


@contextmanager
def new_file(path: Place) -> Iterator[io.RawIOBase]:
    """A stream for the bytes of a file, unbuffered. It is durable once the block has ended without an exception."""
    if isinstance(path, RemotePath):
        with path.upload() as stream:
            yield stream
        return
    with path.open("wb", buffering=0) as raw:
        yield raw
        os.fsync(raw.fileno())


def write_durably(path: Place, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk. An existing link of that name is not followed.

    Raises:
        FileExistsError: there is a file of that name. An object of that name is replaced.
        OSError: the storage refused; no part of the file is left.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    with path.open("xb") as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def replace_durably(path: Place, content: bytes) -> None:
    """Writes a file in place of one that may be there: a reader finds the old one or the new one, whole.

    Raises:
        OSError: the storage refused; the old one is still there.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    new = path.with_name(f".{path.name.removeprefix('.')}.new")
    new.unlink(missing_ok=True)
    try:
        write_durably(new, content)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    sync_directory(path.parent)


def try_writing(folder: Place) -> None:
    """Makes something in a folder and removes it: permission bits lie for root on NFS and on read-only mounts.

    Raises:
        OSError: the storage refused.
    """
    if isinstance(folder, RemotePath):
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    else:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=folder))


def remove_tree(path: Place) -> None:
    """Removes a folder with all that is in it. Errors are ignored."""
    if not isinstance(path, RemotePath):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.remove_tree()


def folders_in(path: Place) -> list[Place]:
    """The folders in a folder by name; none if it is not there."""
    if not isinstance(path, RemotePath):
        return sorted(path.glob("*/"))
    try:
        return [path / name for name, found in sorted(path.entries().items()) if stat.S_ISDIR(found.st_mode)]
    except FileNotFoundError:
        return []


def files_in(path: Place) -> dict[str, os.stat_result]:
    """Every file, pipe or device in a folder by name, links followed; none if it is not there.

    Raises:
        OSError: it cannot be listed.
    """
    if isinstance(path, RemotePath):
        try:
            found = path.entries()
        except FileNotFoundError:
            return {}
    else:
        found = {}
        with suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a link to nothing, or removed since
                    found[entry.name] = entry.stat()
    return {name: one for name, one in found.items() if not stat.S_ISDIR(one.st_mode)}


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. File systems that cannot do it answer EINVAL, which is no error."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
