"""Reads the tensors of a distributed checkpoint box by box, in one process without process groups or a model.

Conversion to other formats uses it, whatever layout wrote the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_mtp.checkpoint.agreement import describe_error
from megatron_mtp.checkpoint.content import COMMON_KEY, OPTIMIZER_PREFIX
from megatron_mtp.checkpoint.directory import checkpoint_folder
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, damage_error, read_manifest, read_verified
from megatron_mtp.checkpoint.preflight import read_saved_config
from megatron_mtp.checkpoint.random_state import RNG_KEY
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place


class StoredTensors:
    """The tensors of a distributed checkpoint, whatever layout wrote it.

    Args:
        folder: of one checkpoint.
        metadata: what `read_metadata` returned.
        with_optimizer: keep the optimizer's tensors too.
    """

    def __init__(self, folder: Place, metadata: Metadata, *, with_optimizer: bool = False):
        self.folder = folder
        self._boxes: dict[str, dict[int, list[_Box]]] = {}
        self._stacks: set[str] = set()
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.left_out: dict[str, int] = {}
        """What is not a weight: "optimizer state" and the like -> number of tensors or objects."""
        for key, stored in metadata.state_dict_metadata.items():
            kind = _other_kind(key)
            is_kept = with_optimizer and key.startswith(OPTIMIZER_PREFIX) and isinstance(stored, TensorStorageMetadata)
            if kind is not None and not is_kept:
                self.left_out[kind] = self.left_out.get(kind, 0) + 1
            elif isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = stored
                by_first = self._boxes.setdefault(key, {})
                for chunk in stored.chunks:
                    info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                    box = _Box(tuple(chunk.offsets), tuple(chunk.sizes), info)
                    by_first.setdefault(box.offset[0] if box.offset else 0, []).append(box)
                if all(box.size and box.size[0] == 1 for boxes in by_first.values() for box in boxes):
                    self._stacks.add(key)

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
        except Exception as error:  # damaged bytes may raise anything in torch.load
            problem = f"{path}: the tensor {key!r} cannot be read ({describe_error(error)})."
            raise damage_error(self.folder, [problem]) from error


class StoredWeights(StoredTensors):
    """The tensors of a complete checkpoint of ours.

    Args:
        path: a run directory (its newest checkpoint is taken), or the folder of one checkpoint.
        verify: compare every byte with the manifest first.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; names all problems.
    """

    def __init__(self, path: str | Place, *, verify: bool = True):
        folder = checkpoint_folder(path)
        self.manifest = read_verified(folder) if verify else read_manifest(folder)
        super().__init__(folder, read_metadata(folder, self.manifest))

    def config(self) -> ConfigContainer:
        """The config that is saved with the weights, not finalized."""
        return ConfigContainer.from_dict(read_saved_config(self.folder / CONFIG_NAME))


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
