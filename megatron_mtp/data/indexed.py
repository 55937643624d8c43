"""Megatron's `.bin/.idx` files: a reader with clear errors, and a writer for batches of documents.

Megatron-Core's IndexedDataset reads and writes the same bytes (a test compares them), but its import takes seconds and
needs torch, and a file that is damaged, or truncated while it is read, ends in an assertion or a bus error.

`.idx`: 9 bytes magic; version, uint64 = 1; dtype code, uint8; number of sequences n, uint64; length of the document
index, uint64; then int32 lengths [n] in tokens, int64 offsets [n] in bytes, int64 document index. `.bin`: the tokens.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path, PurePosixPath

import numpy as np

from megatron_mtp.data.data_file import DataFile
from megatron_mtp.data.object_file import ObjectCache, open_file
from megatron_mtp.errors import DataError
from megatron_mtp.storage.address import is_address

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_BLOCK = 1 << 18  # entries checked at a time: a few MB of memory at any size of the index


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron-Core stores a vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedReader:
    """Read-only view of `<prefix>.bin` and `<prefix>.idx`. Each sequence is a document.

    Every entry of the index is checked when it is opened: a damaged one would give wrong samples without an error.
    Neither file is kept in memory; see `data_file`.

    Args:
        prefix: path or address.
        cache: for addresses; None: they are refused.

    Attributes:
        files: the index and the tokens.
        dtype: of the stored tokens.
        bin_size: bytes of `<prefix>.bin`.
        idx_size: bytes of `<prefix>.idx`.
        is_plain: it holds nothing but sequences, each of which is one document.

    Raises:
        DataError: a file is missing, empty, truncated, of another format, damaged, or does not belong to the other; by
            each method, if it can no longer be read.
    """

    def __init__(self, prefix: str, cache: ObjectCache | None = None):
        self.prefix, self._cache = prefix, cache if is_address(prefix) else None
        self._idx, self._bin = (_open(f"{prefix}{ending}", cache) for ending in (".idx", ".bin"))
        self.files = self._idx, self._bin
        self.idx_size, self.bin_size = self._idx.size, self._bin.size
        self.dtype, self._count, documents = self._read_header(self._idx)
        end = _HEADER.size + len(self) * 12 + documents * 8
        if self.idx_size not in (end, end + len(self)):  # multimodal files hold one more byte for each sequence
            raise DataError(
                f"{self._idx.name}: holds {self.idx_size} bytes, but {len(self)} sequences and {documents} document "
                f"marks take {end}. The file is truncated or damaged: copy or prepare it again."
            )
        self.is_plain = self.idx_size == end and documents == len(self) + 1
        expected = self._check_sequences()
        self._check_documents(documents)
        if self.bin_size != expected:
            raise DataError(
                f"{self._bin.name}: holds {self.bin_size} bytes, but {PurePosixPath(self._idx.name).name} describes "
                f"{expected}. The file is truncated or belongs to another index: copy or prepare it again."
            )

    def _check_sequences(self) -> int:
        """Compares each length with each offset; returns the bytes of all tokens."""
        end = 0
        for begin in range(0, len(self), _BLOCK):
            last = min(begin + _BLOCK, len(self))
            lengths, offsets = self.lengths(begin, last), self._offsets(begin, last)
            sizes = lengths.astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            wrong = (sizes < 0) | (offsets != ends - sizes)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self._idx.name}: is damaged at sequence {begin + at} (length {lengths[at]}, offset "
                    f"{offsets[at]}): each offset must be the sum of the lengths before it. Copy or prepare it again."
                )
            end = int(ends[-1])
        return end

    def _check_documents(self, count: int) -> None:
        """Checks the document index, which Megatron-Core reads."""
        for begin in range(0, count, _BLOCK):
            place = _HEADER.size + len(self) * 12 + begin * 8
            block = self._idx.array(place, min(_BLOCK + 1, count - begin), _INT64)  # one more: neighbours of two blocks
            if block[0] < 0 or block[-1] > len(self) or (block[1:] < block[:-1]).any():
                raise DataError(
                    f"{self._idx.name}: its document index is damaged after entry {begin}: it must rise from 0 to "
                    f"{len(self)}. Copy or prepare it again."
                )

    @staticmethod
    def _read_header(file: DataFile) -> tuple[np.dtype, int, int]:
        if file.size < _HEADER.size:
            raise DataError(
                f"{file.name}: holds {file.size} bytes, fewer than its {_HEADER.size} byte header. Copy or prepare it "
                "again."
            )
        magic, version, code, count, documents = _HEADER.unpack(file.read(0, _HEADER.size))
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(
                f"{file.name}: is not a Megatron index (magic {magic!r}, version {version}, dtype code {code}). "
                "dataset.blend names prefixes of .bin/.idx files that `megatron-mtp prepare` or Megatron-LM wrote."
            )
        if count == 0:
            raise DataError(f"{file.name}: describes no documents. Prepare it again from text that has some.")
        return np.dtype(_DTYPES[code]), count, documents

    def __len__(self) -> int:
        return self._count

    @property
    def is_remote(self) -> bool:
        """Whether it is worthwhile to announce a `read`."""
        return self._bin.is_remote

    @property
    def cache_folder(self) -> Path:
        """Folder on this machine for what is worked out from the files."""
        return Path(f"{self.prefix}_cache") if self._cache is None else self._cache.folder / "indices"

    def lengths(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Tokens in each of the sequences [first, last), int32; None: to the last one."""
        count = (len(self) if last is None else last) - first
        return self._idx.array(_HEADER.size + first * 4, count, _INT32)

    def _offsets(self, first: int, last: int) -> np.ndarray:
        """First byte of each of the sequences [first, last), int64."""
        return self._idx.array(_HEADER.size + len(self) * 4 + first * 8, last - first, _INT64)

    def count_tokens(self, first: int, last: int) -> int:
        """Number of tokens in the sequences [first, last), which are stored contiguously."""
        if first >= last:
            return 0
        begin, end = int(self._offsets(first, first + 1)[0]), int(self._offsets(last - 1, last)[0])
        return (end - begin) // self.dtype.itemsize + int(self.lengths(last - 1, last)[0])

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of a sequence from `offset` on (None: to its end), as stored."""
        begin, length = self._place(sequence, offset, length)
        return self._bin.array(begin, length, self.dtype)

    def will_read(self, sequence: int, offset: int = 0, length: int | None = None) -> None:
        """Announces a `read`, which then takes less time. Returns at once."""
        begin, length = self._place(sequence, offset, length)
        self._bin.will_read(begin, length * self.dtype.itemsize)

    def _place(self, sequence: int, offset: int, length: int | None) -> tuple[int, int]:
        """First byte, and number of tokens."""
        if length is None:
            length = int(self.lengths(sequence, sequence + 1)[0]) - offset
        return int(self._offsets(sequence, sequence + 1)[0]) + offset * self.dtype.itemsize, length


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


def _open(name: str, cache: ObjectCache | None) -> DataFile:
    try:
        file = open_file(name, "Copy or prepare it again, and start the run again.", cache)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}). Data sets are named by their prefix, without .bin or .idx; "
            "relative ones start from the working directory."
        ) from error
    if file.size == 0:
        raise DataError(f"{name}: is empty (0 bytes). Copy or prepare it again.")
    return file
