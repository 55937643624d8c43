"""Reads torch's distributed checkpoints from files and from object storage."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader

from megatron_mtp.storage.place import Place


class PlaceReader(FileSystemReader):
    """torch's reader of a folder, as its `FsspecReader`, but with the retries and errors of `RemotePath`.

    Args:
        folder: of one checkpoint.
    """

    def __init__(self, folder: Place):
        super().__init__(os.curdir)
        self.fs = _Places()
        self.path = cast(Any, folder)


class _Places(FileSystem):
    """The steps of torch's reader on places."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix
