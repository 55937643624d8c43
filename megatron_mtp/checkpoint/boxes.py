"""Writes the files of a distributed checkpoint box by box, as one process without process groups or a model."""

from __future__ import annotations

import io
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mtp.checkpoint.content import COMMON_KEY
from megatron_mtp.checkpoint.manifest import FileEntry
from megatron_mtp.checkpoint.writer import HashedStream, Written, save_tensor
from megatron_mtp.storage.place import Place, new_file

FILE_BYTES = 8 << 30


@dataclass(slots=True)
class _File:
    opened: ExitStack
    raw: io.BufferedWriter
    stream: HashedStream
    name: str


class _IncompleteError(Exception):
    """Ends the block of a file that is not complete."""


@dataclass(slots=True)
class BoxWriter:
    """Tensors of one checkpoint, written in any order.

    Attributes:
        folder: of the files; it exists.
        file_bytes: a file that exceeds this is followed by another.
    """

    folder: Place
    file_bytes: int = FILE_BYTES
    _file: _File | None = None
    _entries: list[FileEntry] = field(default_factory=list)
    _results: list[WriteResult] = field(default_factory=list)
    _tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)

    def add(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], box: Tensor) -> None:
        """Writes one box of a tensor.

        Args:
            shape: of the full tensor.
            offset: where the box begins. Boxes of one tensor do not overlap; in total they fill it.
        """
        stored = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=box.dtype), torch.Size(shape), [])
        )
        assert (stored.properties.dtype, tuple(stored.size)) == (box.dtype, shape), f"{key} changes its form"
        stored.chunks.append(ChunkStorageMetadata(torch.Size(offset), box.shape))
        file = self._current_file()
        start = file.stream.position
        save_tensor(box, file.stream)
        self._record(MetadataIndex(key, torch.Size(offset)), file, start)

    def finish(self, common: dict[str, Any]) -> tuple[Metadata, list[Written]]:
        """Writes the object that Megatron-Core's loader asks for. Returns what leads to the tensors, and the files."""
        file = self._current_file()
        start = file.stream.position
        torch.save([common], cast(IO[bytes], file.stream))
        key = f"{COMMON_KEY}/shard_0_1"
        self._record(MetadataIndex(key), file, start)
        self._close_file()
        metadata = Metadata({**self._tensors, key: BytesStorageMetadata()})
        return metadata, [Written(self._results, None), *(Written([], entry) for entry in self._entries)]

    def close(self) -> None:
        """Closes an open file, which is then not complete."""
        if self._file is not None:
            with suppress(_IncompleteError):
                self._file.opened.__exit__(_IncompleteError, _IncompleteError(), None)

    def _record(self, index: MetadataIndex, file: _File, start: int) -> None:
        length = file.stream.position - start
        self._results.append(WriteResult(index, length, _StorageInfo(file.name, start, length)))

    def _current_file(self) -> _File:
        if self._file is not None and self._file.stream.position >= self.file_bytes:
            self._close_file()
        if self._file is None:
            name = f"__0_{len(self._entries)}.distcp"
            opened = ExitStack()
            raw = io.BufferedWriter(cast(Any, opened.enter_context(new_file(self.folder / name))))
            self._file = _File(opened, raw, HashedStream(raw), name)
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.raw.flush()
            file.opened.close()
            self._entries.append(FileEntry(file.name, file.stream.position, file.stream.digest.hexdigest()))
