"""Safetensors files of a Hugging Face folder, read and written one tensor at a time.

The safetensors library maps files into memory, and touched pages count as the process's own. To bound memory, this
reader parses the header itself and reads one tensor at a time (format: huggingface/safetensors README).
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mtp.errors import ConversionError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPE_OF_CODE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_LARGEST_HEADER = 100_000_000  # the library's limit
_SLICE_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of a tensor in a file, in bytes. `dtype` is the format's code."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's; it must be in DTYPE_OF_CODE."""
        return DTYPE_OF_CODE[self.dtype]


class TensorFiles:
    """The tensors of one folder, by name.

    Args:
        subfolder: a subfolder whose tensors belong to the model too, if it exists.

    Raises:
        ConversionError: a file is missing, truncated or malformed, or index and files differ; names all problems.
    """

    def __init__(self, folder: Path, subfolder: str | None = None):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        problems = self._add(folder)
        if subfolder is not None and (folder / subfolder).is_dir():
            problems += self._add(folder / subfolder)
        if problems:
            raise ConversionError("\n".join(problems))

    def _add(self, folder: Path) -> list[str]:
        """Reads the headers of a folder's files. Returns all problems."""
        problems: list[str] = []
        index = _read_index(folder)
        for name in sorted(set(index.values())) if index is not None else [SINGLE_NAME]:
            try:
                found = read_header(folder / name)
            except ConversionError as error:
                problems.append(str(error))
                continue
            twice = found.keys() & self.entries.keys()
            problems += [f"{folder / name}: {tensor} is also in {self.entries[tensor].path.name}." for tensor in twice]
            self.entries |= found
            if index is not None:
                problems += _index_problems(folder, name, index, found)
        return problems

    def read(self, name: str) -> Tensor:
        """Reads one tensor, in its own dtype, into new memory."""
        entry = self.entries[name]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        with entry.path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            _fill(stream, raw, entry.path)
        return raw.view(entry.torch_dtype).reshape(entry.shape)

    def are_equal(self, left: str, right: str) -> bool:
        """Whether two tensors have the same bits, compared in slices."""
        one, two = self.entries[left], self.entries[right]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with one.path.open("rb") as first, two.path.open("rb") as second:
            first.seek(one.start)
            second.seek(two.start)
            left_bytes = one.end - one.start
            while left_bytes > 0:
                size = min(_SLICE_BYTES, left_bytes)
                if first.read(size) != second.read(size):
                    return False
                left_bytes -= size
        return True


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if there is a single file."""
    path = folder / INDEX_NAME
    if path.exists() and (folder / SINGLE_NAME).exists():
        raise ConversionError(
            f"{folder}: holds {SINGLE_NAME} beside {INDEX_NAME}, two models for all that is known: transformers reads "
            "the first, other readers the second. Remove one, with its shards."
        )
    if not path.exists():
        if (folder / SINGLE_NAME).exists():
            return None
        others = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        hint = f" {others[0]} is a pickle; save the model with transformers as safetensors first." if others else ""
        raise ConversionError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}.{hint}")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(file).name == file for file in weight_map.values()):
            raise ValueError("it names files outside the folder")
        return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}).") from error


def _index_problems(folder: Path, name: str, index: dict[str, str], found: dict[str, Entry]) -> list[str]:
    listed = {tensor for tensor, file in index.items() if file == name}
    return [
        f"{folder / name}: lacks {tensor}, which {INDEX_NAME} places there." for tensor in sorted(listed - set(found))
    ] + [
        f"{folder / name}: holds {tensor}, which {INDEX_NAME} does not place there."
        for tensor in sorted(set(found) - listed)
    ]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, whose length must match its header.

    Raises:
        ConversionError: it is not a complete safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LARGEST_HEADER, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        entries = {name: _entry(path, base, values) for name, values in header.items()}
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConversionError(f"{path}: is not a safetensors file ({error}).") from error
    end = max((entry.end for entry in entries.values()), default=base)
    if size != end:
        last = max(entries, key=lambda name: entries[name].end, default="the header")
        raise ConversionError(
            f"{path}: has {size} bytes and its header describes {end}: it is "
            f"{'truncated' if size < end else 'too long'} (the last tensor is {last}). Download it again."
        )
    return entries


def _entry(path: Path, base: int, values: dict[str, Any]) -> Entry:
    start, end = values["data_offsets"]
    shape = tuple(values["shape"])
    entry = Entry(path, values["dtype"], shape, base + start, base + end)
    if entry.dtype in DTYPE_OF_CODE and torch.Size(shape).numel() * entry.torch_dtype.itemsize != end - start:
        raise ValueError(f"the size of a tensor of shape {list(shape)} is not {end - start} bytes")
    return entry


def _fill(stream: Any, raw: Tensor, path: Path) -> None:
    view = memoryview(raw.numpy())
    while view:
        count = stream.readinto(view)  # at most 2 GiB at a time
        if not count:
            raise ConversionError(f"{path}: ended while it was being read.")
        view = view[count:]


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
