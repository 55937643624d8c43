"""Safetensors files of a Hugging Face folder, read one tensor at a time.

The safetensors library maps files into memory, and touched pages count as the process's own. To bound memory, this
reader parses the header itself and reads one tensor at a time (format: huggingface/safetensors README).
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mtp.convert.quantization import (
    DEFAULT_BLOCK,
    FP8_CODE,
    SCALE_ENDING,
    Block,
    dequantized,
    scale_problem,
)
from megatron_mtp.errors import ConversionError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_LARGEST_HEADER = 100_000_000  # the library's limit
_SLICE_BYTES = 1 << 26
_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of a tensor in a file, in bytes. `dtype` is the format's code, `scales` those of a quantized weight."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    scales: Entry | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's; it must be in DTYPE_OF_CODE."""
        return DTYPE_OF_CODE[self.dtype]


class TensorFiles:
    """The tensors of one folder, by name.

    Args:
        subfolder: a subfolder whose tensors belong to the model too, if it exists.
        block: rows and columns that share a scale, of FP8 weights; None: there must be none.

    Attributes:
        entries: every tensor except scales.
        scale_names: name of an FP8 weight -> name of its scales.
        dtype: code of most weights that are not quantized; FP8 weights are read in this dtype.

    Raises:
        ConversionError: a file is missing, truncated or malformed, index and files differ, or an FP8 weight and its
            scales do not match; names all problems.
    """

    def __init__(self, folder: Path, subfolder: str | None = None, *, block: Block | None = None):
        self.folder = folder
        self.block = block
        self.entries: dict[str, Entry] = {}
        self.scale_names: dict[str, str] = {}
        problems = self._add(folder)
        if subfolder is not None and (folder / subfolder).is_dir():
            problems += self._add(folder / subfolder)
        problems += self._pair_scales()
        if problems:
            raise ConversionError("\n".join(problems[:_MOST_SHOWN]))
        counts = Counter(entry.dtype for entry in self.entries.values() if entry.scales is None)
        self.dtype = counts.most_common(1)[0][0] if counts else "F32"

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

    def _pair_scales(self) -> list[str]:
        """Gives FP8 weights their scales, which are then no tensors of their own. Returns all problems."""
        weights = sorted(name for name, entry in self.entries.items() if entry.dtype == FP8_CODE)
        if self.block is None and weights:
            return [
                f"{self.folder}: {weights[0]} is {FP8_CODE}, and config.json has no quantization_config. Take the "
                "config.json that belongs to these files."
            ]
        problems = []
        for name in weights:
            entry, scales = self.entries[name], self.entries.pop(name + SCALE_ENDING, None)
            found = None if scales is None else (scales.dtype, scales.shape)
            problem = scale_problem(entry.shape, found, self.block or DEFAULT_BLOCK)
            if problem is not None:
                problems.append(f"{entry.path}: {name} {problem}")
                continue
            self.entries[name] = replace(entry, scales=scales)
            self.scale_names[name] = name + SCALE_ENDING
        alone = sorted(name for name in self.entries if name.endswith(SCALE_ENDING))
        problems += [
            f"{self.entries[name].path}: {name} scales no FP8 weight: {name.removesuffix(SCALE_ENDING)} is "
            f"{getattr(self.entries.get(name.removesuffix(SCALE_ENDING)), 'dtype', 'missing')}."
            for name in alone
        ]
        return problems

    def dtype_of(self, name: str) -> str:
        """Code of the dtype in which `read` returns a tensor."""
        entry = self.entries[name]
        return entry.dtype if entry.scales is None else self.dtype

    def names_in_files(self, names: Iterable[str]) -> list[str]:
        """These tensors and their scales, sorted."""
        given = set(names)
        return sorted(given | {self.scale_names[name] for name in given & self.scale_names.keys()})

    def read(self, name: str) -> Tensor:
        """Reads one tensor into new memory, in its own dtype; an FP8 weight is dequantized."""
        entry = self.entries[name]
        values = _read_entry(entry)
        if entry.scales is None:
            return values
        return dequantized(values, _read_entry(entry.scales), self.block or DEFAULT_BLOCK, DTYPE_OF_CODE[self.dtype])

    def are_equal(self, left: str, right: str) -> bool:
        """Whether two tensors have the same bits, compared in slices."""
        one, two = self.entries[left], self.entries[right]
        if one.scales is None and two.scales is None:
            return _same_bytes(one, two)
        return self.dtype_of(left) == self.dtype_of(right) and torch.equal(self.read(left), self.read(right))


def _read_entry(entry: Entry) -> Tensor:
    raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        _fill(stream, raw, entry.path)
    return raw.view(entry.torch_dtype).reshape(entry.shape)


def _same_bytes(one: Entry, two: Entry) -> bool:
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
