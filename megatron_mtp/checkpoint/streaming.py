"""Reads and writes the weights of a checkpoint box by box, in one process without process groups or a model.

Conversion to and from other formats uses it. A run loads what is written here at any layout, and checkpoints of any
layout are read here.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable
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
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_mtp.checkpoint.agreement import describe_error
from megatron_mtp.checkpoint.content import COMMON_KEY, OPTIMIZER_PREFIX
from megatron_mtp.checkpoint.directory import RunDirectory, checkpoint_folder
from megatron_mtp.checkpoint.kept_files import KEPT_FOLDER, copy_files, model_files
from megatron_mtp.checkpoint.manifest import (
    CONFIG_NAME,
    FileEntry,
    Manifest,
    damage_error,
    read_manifest,
    read_verified,
)
from megatron_mtp.checkpoint.preflight import read_saved_config
from megatron_mtp.checkpoint.random_state import RNG_KEY
from megatron_mtp.checkpoint.untrusted import read_metadata
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
        self, cfg: ConfigContainer, train_state: dict[str, Any], *, reason: str, tokenizer: str | None = None
    ) -> Path:
        """Completes the checkpoint; returns its folder.

        Args:
            cfg: finalized config of the model.
            train_state: of `TrainState.to_dict`.
            tokenizer: fingerprint of the run's tokenizer.
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
        state = {"train": train_state, "optimizer": {"step": None, "grad_scaler": None}}
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


class StoredWeights:
    """The tensors of a complete checkpoint, whatever layout wrote it.

    Args:
        path: a run directory (its newest checkpoint is taken), or the folder of one checkpoint.
        verify: compare every byte with the manifest first.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; names all problems.
    """

    def __init__(self, path: Path, *, verify: bool = True):
        self.folder = checkpoint_folder(path)
        self.manifest = read_verified(self.folder) if verify else read_manifest(self.folder)
        metadata = read_metadata(self.folder, self.manifest)
        self._boxes: dict[str, dict[int, list[_Box]]] = {}
        self._stacks: set[str] = set()
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.left_out: dict[str, int] = {}
        """What is not a weight: "optimizer state" and the like -> number of tensors or objects."""
        for key, stored in metadata.state_dict_metadata.items():
            kind = _other_kind(key)
            if kind is not None:
                self.left_out[kind] = self.left_out.get(kind, 0) + 1
            elif isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = stored
                by_first = self._boxes.setdefault(key, {})
                for chunk in stored.chunks:
                    info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                    box = _Box(tuple(chunk.offsets), tuple(chunk.sizes), info)
                    by_first.setdefault(box.offset[0], []).append(box)
                if all(box.size[0] == 1 for boxes in by_first.values() for box in boxes):
                    self._stacks.add(key)

    def config(self) -> ConfigContainer:
        """The config that is saved with the weights, not finalized."""
        return ConfigContainer.from_dict(read_saved_config(self.folder / CONFIG_NAME))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a full tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.tensors[key].properties.dtype

    def boxes(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offset, size) of each stored part of a tensor."""
        return [(box.offset, box.size) for boxes in self._boxes[key].values() for box in boxes]

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """One box, assembled from the stored parts.

        Raises:
            CheckpointError: a part of it is not stored, or cannot be read.
        """
        hits = [(box, shared) for box in self._candidates(key, offset, size) if (shared := box.overlap(offset, size))]
        if len(hits) == 1 and (hits[0][0].offset, hits[0][0].size) == (offset, size):
            return self._load(key, hits[0][0].info)
        target = torch.empty(size, dtype=self.dtype(key))
        count = 0
        for box, (ours, theirs) in hits:
            part = self._load(key, box.info)[theirs]
            target[ours] = part
            count += part.numel()
        if count != target.numel():
            raise CheckpointError(f"{self.folder}: holds only {count} of {target.numel()} values of {key} at {offset}.")
        return target

    def whole(self, key: str) -> Tensor:
        """The full tensor."""
        return self.read(key, (0,) * len(self.shape(key)), self.shape(key))

    def _candidates(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> list[_Box]:
        """Boxes that may overlap. A stack of layers and experts has tens of thousands, each one layer thick."""
        by_first = self._boxes[key]
        if key in self._stacks and size[0] == 1:
            return by_first.get(offset[0], [])
        return [box for boxes in by_first.values() for box in boxes]

    def _load(self, key: str, info: _StorageInfo) -> Tensor:
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as stream:
                view = _create_file_view(stream, info.offset, info.length)
                return torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True).detach()
        except Exception as error:
            problem = f"{path}: the tensor {key!r} cannot be read ({describe_error(error)})."
            raise damage_error(self.folder, [problem]) from error


def _other_kind(key: str) -> str | None:
    kinds: Iterable[tuple[str, str]] = (
        (OPTIMIZER_PREFIX, "optimizer state"),
        (RNG_KEY, "random state"),
        (COMMON_KEY, "Megatron-Core's common state"),
    )
    return next((kind for prefix, kind in kinds if key.startswith(prefix)), None)


@dataclass(frozen=True, slots=True)
class _Box:
    """A stored part of a tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    info: _StorageInfo

    def overlap(
        self, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The overlap with another box, as slices of that box and of this one; None: they do not overlap."""
        theirs, ours = [], []
        for o, n, p, m in zip(offset, size, self.offset, self.size, strict=True):
            low, high = max(o, p), min(o + n, p + m)
            if low >= high:
                return None
            theirs.append(slice(low - o, high - o))
            ours.append(slice(low - p, high - p))
        return tuple(theirs), tuple(ours)
