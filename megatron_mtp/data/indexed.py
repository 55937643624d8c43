"""Megatron's `.bin/.idx` files: a memory-mapped reader with clear errors, and a writer for batches of documents.

Megatron-Core's IndexedDataset reads and writes the same bytes (a test compares them), but its import takes seconds and
needs torch, and a damaged file ends in an assertion or a bus error.

`.idx`: 9 bytes magic; version, uint64 = 1; dtype code, uint8; number of sequences n, uint64; length of the document
index, uint64; then int32 lengths [n] in tokens, int64 offsets [n] in bytes, int64 document index. `.bin`: the tokens.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from megatron_mtp.data.files import stat_file
from megatron_mtp.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 18  # entries checked at a time: a few MB of memory at any size of the index


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron-Core stores a vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedReader:
    """Read-only view of `<prefix>.bin` and `<prefix>.idx`. Each sequence is a document.

    Every entry of the index is checked when it is opened: a damaged one would give wrong samples without an error.

    Attributes:
        lengths: int32 [n], tokens in each sequence.
        dtype: of the stored tokens.
        bin_size: bytes of `<prefix>.bin`.
        idx_size: bytes of `<prefix>.idx`.

    Raises:
        DataError: a file is missing, empty, truncated, of another format, damaged, or does not belong to the other.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.idx_size, self.bin_size = _size(idx_path), _size(bin_path)
        self.dtype, count, documents = self._read_header(idx_path, self.idx_size)
        end = _HEADER.size + count * 12 + documents * 8
        if self.idx_size not in (end, end + count):  # multimodal files hold one more byte for each sequence
            raise DataError(
                f"{idx_path}: holds {self.idx_size} bytes, but {count} sequences and {documents} document marks take "
                f"{end}. The file is truncated or damaged: copy or prepare it again."
            )
        table = np.memmap(idx_path, np.uint8, "r")
        self.lengths = table[_HEADER.size :][: count * 4].view(np.int32)
        self._offsets = table[_HEADER.size + count * 4 :][: count * 8].view(np.int64)
        expected = self._check_entries(table[_HEADER.size + count * 12 :][: documents * 8].view(np.int64))
        if self.bin_size != expected:
            raise DataError(
                f"{bin_path}: holds {self.bin_size} bytes, but {idx_path.name} describes {expected}. The file is "
                "truncated or belongs to another index: copy or prepare it again."
            )
        self._tokens = np.memmap(bin_path, self.dtype, "r")

    def _check_entries(self, marks: np.ndarray) -> int:
        """Compares each length with each offset, and the document index with both; returns the bytes of all tokens."""
        end = 0
        for begin in range(0, len(self), _BLOCK):
            sizes = self.lengths[begin : begin + _BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            wrong = (sizes < 0) | (self._offsets[begin : begin + _BLOCK] != ends - sizes)
            if wrong.any():
                at = begin + int(np.argmax(wrong))
                raise DataError(
                    f"{self.prefix}.idx: is damaged at sequence {at} (length {self.lengths[at]}, offset "
                    f"{self._offsets[at]}): each offset must be the sum of the lengths before it. Copy or prepare it "
                    "again."
                )
            end = int(ends[-1])
        for begin in range(0, len(marks), _BLOCK):
            block = marks[begin : begin + _BLOCK + 1]  # one more, to compare neighbours of two blocks
            if block[0] < 0 or block[-1] > len(self) or (block[1:] < block[:-1]).any():
                raise DataError(
                    f"{self.prefix}.idx: its document index is damaged after entry {begin}: it must rise from 0 to "
                    f"{len(self)}. Copy or prepare it again."
                )
        return end

    @staticmethod
    def _read_header(path: Path, size: int) -> tuple[np.dtype, int, int]:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if size < _HEADER.size:
            raise DataError(
                f"{path}: holds {size} bytes, fewer than its {_HEADER.size} byte header. Copy or prepare it again."
            )
        magic, version, code, count, documents = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(
                f"{path}: is not a Megatron index (magic {magic!r}, version {version}, dtype code {code}). "
                "dataset.blend names prefixes of .bin/.idx files that `megatron-mtp prepare` or Megatron-LM wrote."
            )
        if count == 0:
            raise DataError(f"{path}: describes no documents. Prepare it again from text that has some.")
        return np.dtype(_DTYPES[code]), count, documents

    def __len__(self) -> int:
        return len(self.lengths)

    def count_tokens(self, first: int, last: int) -> int:
        """Number of tokens in the sequences [first, last), which are stored contiguously."""
        if first >= last:
            return 0
        begin, end = int(self._offsets[first]), int(self._offsets[last - 1])
        return (end - begin) // self.dtype.itemsize + int(self.lengths[last - 1])

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of a sequence from `offset` on (None: to its end), as stored, without a copy."""
        begin = int(self._offsets[sequence]) // self.dtype.itemsize
        end = int(self.lengths[sequence]) if length is None else offset + length
        return self._tokens[begin + offset : begin + end]


class IndexedWriter:
    """Writes `<prefix>.bin`, and `<prefix>.idx` on `close`. Without the latter there is no data set.

    Args:
        dtype: of the stored tokens; see `token_dtype`.

    Attributes:
        bin_sha256: of what was meant to be written, in hex; complete after `close`.
        idx_sha256: the same of the index.
    """

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - closed by close
        self._lengths: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self.bin_sha256 = self.idx_sha256 = ""

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents, given as concatenated tokens and the number of tokens of each."""
        assert int(np.sum(lengths, dtype=np.int64)) == len(tokens)
        data = np.ascontiguousarray(tokens, self.dtype).data
        self._digest.update(data)
        self._bin.write(data)
        self._lengths.append(np.asarray(lengths, np.int32))

    def close(self) -> tuple[int, int]:
        """Writes the index; returns the numbers of documents and tokens."""
        self._bin.close()
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64)
        parts: tuple[bytes, ...] = (
            _HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1),
            lengths.tobytes(),
            ((ends - lengths) * self.dtype.itemsize).tobytes(),
            np.arange(len(lengths) + 1, dtype=np.int64).tobytes(),
        )
        idx_digest = hashlib.sha256()
        with Path(f"{self.prefix}.idx").open("wb") as file:
            for part in parts:
                idx_digest.update(part)
                file.write(part)
        self.bin_sha256, self.idx_sha256 = self._digest.hexdigest(), idx_digest.hexdigest()
        return len(lengths), int(ends[-1]) if len(ends) else 0


def _size(path: Path) -> int:
    try:
        size = stat_file(path).st_size
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). dataset.blend names prefixes, without .bin or .idx; "
            "relative ones start from the working directory."
        ) from error
    if size == 0:
        raise DataError(f"{path}: is empty (0 bytes). Copy or prepare it again.")
    return size
