"""Writes safetensors files of a Hugging Face folder, one tensor at a time, in any order."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mtp.convert.tensor_files import CODE_OF_DTYPE, INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorWriter:
    """Writes tensors in any order into files whose layout is fixed beforehand.

    Args:
        folder: an empty folder.
        planned: every tensor, in the order of the files.
        shard_bytes: most data per file; a larger tensor gets its own file.
    """

    def __init__(self, folder: Path, planned: list[Planned], shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.written: set[str] = set()
        self._places: dict[str, tuple[Path, int, Planned]] = {}
        shards = _cut(planned, shard_bytes)
        names = [SINGLE_NAME] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            self._lay_out(folder / name, shard)
        if len(shards) > 1:
            weight_map = {tensor: path.name for tensor, (path, _, _) in sorted(self._places.items())}
            total = sum(tensor.num_bytes for tensor in planned)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _lay_out(self, path: Path, shard: list[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Wide elements first keep every tensor aligned to its element size.
        ordered = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
        offsets = []
        for tensor in ordered:
            end = position + tensor.num_bytes
            header[tensor.name] = {
                "dtype": CODE_OF_DTYPE[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            offsets.append(position)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
        for tensor, offset in zip(ordered, offsets, strict=True):
            self._places[tensor.name] = (path, 8 + len(text) + offset, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one planned tensor, in its planned dtype and shape."""
        path, offset, planned = self._places[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, planned.shape), f"{name} differs from its plan"
        assert name not in self.written, f"{name} was already written"
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with path.open("r+b", buffering=0) as stream:
            stream.seek(offset)
            view = memoryview(raw)
            while view:
                view = view[stream.write(view) :]
        self.written.add(name)

    def close(self) -> None:
        """Flushes all files to disk. Every planned tensor must have been written."""
        missing = self._places.keys() - self.written
        assert not missing, f"never written: {sorted(missing)[:5]}"
        for path in {path for path, _, _ in self._places.values()}:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _cut(planned: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
