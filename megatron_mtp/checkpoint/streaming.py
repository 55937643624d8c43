"""Writes a checkpoint of weights box by box, in one process without process groups or a model.

Conversion from other formats uses it. A run loads what is written here at any layout.
"""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
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

from megatron_mtp.checkpoint.agreement import describe_error
from megatron_mtp.checkpoint.content import COMMON_KEY
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.kept_files import KEPT_FOLDER, copy_files, model_files
from megatron_mtp.checkpoint.manifest import (
    FileEntry,
    Manifest,
)
from megatron_mtp.checkpoint.writer import HashedStream, Written, save_tensor, write_shared_files
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import CheckpointError

FILE_BYTES = 8 << 30


@dataclass(slots=True)
class _File:
    raw: io.BufferedWriter
    stream: HashedStream
    name: str


@dataclass(slots=True)
class WeightsWriter:
    """Writes a checkpoint of weights only. Use it in a `with` block: after an exception no files are left.

    Attributes:
        path: run directory; made if it is missing, and must hold no checkpoint.
        file_bytes: a file that exceeds this is followed by another.

    Raises:
        CheckpointError: the directory cannot be written or holds a checkpoint.
    """

    path: Path
    file_bytes: int = FILE_BYTES
    iteration: int = 0
    _made: bool = False
    _kept: Path | None = None
    _file: _File | None = None
    _entries: list[FileEntry] = field(default_factory=list)
    _results: list[WriteResult] = field(default_factory=list)
    _tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)

    def __enter__(self) -> WeightsWriter:
        directory = RunDirectory(self.path)
        if directory.iterations():
            raise CheckpointError(f"{self.path}: holds a checkpoint already. Choose another directory.")
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            directory.begin(self.iteration)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({describe_error(error)}).") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.raw.close()
        if kind is not None:
            RunDirectory(self.path).abandon(self.iteration)
            if self._kept is not None:
                shutil.rmtree(self._kept, ignore_errors=True)
            if self._made and not any(self.path.iterdir()):
                self.path.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.path}: the checkpoint was not written ({describe_error(error)}).") from error

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

    def keep(self, source: Path) -> Path:
        """Copies tokenizer and model files of a folder to RUN/hf, which is returned."""
        kept = self.path / KEPT_FOLDER
        self._kept = None if kept.exists() else kept
        copy_files(source, kept, model_files(source))
        return kept

    def complete(
        self,
        cfg: ConfigContainer,
        train_state: dict[str, Any],
        *,
        reason: str,
        tokenizer: str | None = None,
        optimizer_step: int | None = None,
    ) -> Path:
        """Completes the checkpoint; returns its folder.

        Args:
            cfg: finalized config of the model.
            train_state: of `TrainState.to_dict`.
            tokenizer: fingerprint of the run's tokenizer.
            optimizer_step: updates of an optimizer whose tensors were added; None: there are none.
        """
        file = self._current_file()
        start = file.stream.position
        torch.save([{}], cast(IO[bytes], file.stream))  # Megatron-Core's loader asks for its own object
        common = f"{COMMON_KEY}/shard_0_1"
        self._record(MetadataIndex(common), file, start)
        self._close_file()
        directory = RunDirectory(self.path)
        partial = directory.partial_path(self.iteration)
        metadata = Metadata({**self._tensors, common: BytesStorageMetadata()})
        written = [Written(self._results, None), *(Written([], entry) for entry in self._entries)]
        state = {"train": train_state, "optimizer": {"step": optimizer_step, "grad_scaler": None}}
        files = write_shared_files(partial, cfg, state, metadata, written)
        # No run has world size 0, so that none restores random state from here.
        manifest = Manifest(iteration=self.iteration, files=files, world_size=0, reason=reason, tokenizer=tokenizer)
        return directory.complete(replace(manifest, consumed_samples=train_state["consumed_samples"]))

    def _record(self, index: MetadataIndex, file: _File, start: int) -> None:
        length = file.stream.position - start
        self._results.append(WriteResult(index, length, _StorageInfo(file.name, start, length)))

    def _current_file(self) -> _File:
        if self._file is not None and self._file.stream.position >= self.file_bytes:
            self._close_file()
        if self._file is None:
            name = f"__0_{len(self._entries)}.distcp"
            raw = (RunDirectory(self.path).partial_path(self.iteration) / name).open("wb")
            self._file = _File(raw, HashedStream(raw), name)
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.raw.flush()
            os.fsync(file.raw.fileno())
            file.raw.close()
            self._entries.append(FileEntry(file.name, file.stream.position, file.stream.digest.hexdigest()))
