"""Tokenized documents before the shuffle: written in the order of the input, read back bucket by bucket.

Each input file becomes one spool. Its documents go to buckets at random (or in turn); a bucket of all spools together
fits in memory, where it is shuffled. A spool is written in runs of bounded size, each sorted by bucket:

    <name>.tokens         the tokens of run 0, bucket 0; run 0, bucket 1; ...; run 1, bucket 0; ...
    <name>.lengths.npy    int32, tokens of each document in the same order
    <name>.bounds.npy     int64 [runs, buckets + 1, 2], first document and first token of each bucket in each run
    <name>.json           counts; written last, so a spool without it is incomplete
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np

from megatron_mtp.data.files import load_array, write_atomically
from megatron_mtp.data.randomness import derive_key, hash_u64, permute
from megatron_mtp.errors import DataError

RUN_TOKENS = 1 << 23  # about 0.3 GB while a run is sorted


@dataclass(slots=True)
class SpoolCounts:
    """Counts of the lines of one input file."""

    documents: int = 0
    tokens: int = 0
    largest_id: int = -1
    empty: int = 0
    skipped: int = 0
    first_skipped: str = ""

    def add(self, other: SpoolCounts) -> None:
        """Adds the counts of another file."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.largest_id = max(self.largest_id, other.largest_id)
        self.empty += other.empty
        self.skipped += other.skipped
        self.first_skipped = self.first_skipped or other.first_skipped

    def skip(self, what: str) -> None:
        """Counts a malformed line and remembers the first."""
        self.skipped += 1
        self.first_skipped = self.first_skipped or what


@dataclass(frozen=True, slots=True)
class Buckets:
    """The bucket of each document, and the order inside a bucket.

    Attributes:
        count: number of buckets.
        seed: of the shuffle; None: documents go to the buckets in turn and stay in order.
    """

    count: int
    seed: int | None

    def of(self, documents: np.ndarray, spool: int) -> np.ndarray:
        """Buckets, int64 [n], of documents given by their number in a spool."""
        if self.seed is None:
            return documents % self.count
        hashes = hash_u64(documents, derive_key(self.seed, "bucket", spool))
        return (hashes % np.uint64(self.count)).astype(np.int64)

    def order(self, bucket: int, num_documents: int) -> np.ndarray:
        """Order, int64 [n], in which the documents of a bucket are written."""
        index = np.arange(num_documents)
        if self.seed is None or num_documents == 0:
            return index
        return permute(index, num_documents, derive_key(self.seed, "order", bucket))


def regroup(tokens: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Concatenated tokens of documents, rearranged into another order of the documents."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    moved = lengths[order]
    shift = begins[order] - (np.cumsum(moved, dtype=np.int64) - moved)
    return tokens[np.repeat(shift, moved) + np.arange(len(tokens))]


def is_complete(path: Path) -> bool:
    """Whether a spool was written to its end."""
    return path.with_suffix(".json").exists()


def read_counts(path: Path) -> SpoolCounts:
    """The counts of a complete spool.

    Raises:
        DataError: they are damaged.
    """
    try:
        counts = SpoolCounts(**json.loads(path.with_suffix(".json").read_bytes()))
        if any(
            type(value) is not type(default)
            for value, default in zip(astuple(counts), astuple(SpoolCounts()), strict=True)
        ):
            raise TypeError("a count is not a number")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({error}). Delete {path.parent} and run again.") from error
    return counts


class SpoolWriter:
    """Writes the spool of one input file.

    Args:
        path: folder and name, without an ending.
        number: of the input file; with the seed it determines the buckets of its documents.
    """

    def __init__(self, path: Path, number: int, buckets: Buckets, dtype: np.dtype, run_tokens: int = RUN_TOKENS):
        self.path, self.number, self.buckets, self.dtype, self.run_tokens = path, number, buckets, dtype, run_tokens
        self.counts = SpoolCounts()
        self._file = path.with_suffix(".tokens").open("wb")
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_tokens = 0
        self._lengths: list[np.ndarray] = []
        self._bounds: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents, given as concatenated tokens and the number of tokens of each."""
        self._pending.append((tokens.astype(self.dtype), lengths.astype(np.int32)))
        self._pending_tokens += len(tokens)
        if len(tokens):
            self.counts.largest_id = max(self.counts.largest_id, int(tokens.max()))
        if self._pending_tokens >= self.run_tokens:
            self._write_run()

    def close(self) -> SpoolCounts:
        """Writes the rest and completes the spool."""
        if self._pending:
            self._write_run()
        self._file.close()
        empty = np.zeros((0, self.buckets.count + 1, 2), np.int64)
        np.save(self.path.with_suffix(".lengths.npy"), np.concatenate([np.empty(0, np.int32), *self._lengths]))
        np.save(self.path.with_suffix(".bounds.npy"), np.stack(self._bounds) if self._bounds else empty)
        write_atomically(self.path.with_suffix(".json"), json.dumps(asdict(self.counts)).encode())
        return self.counts

    def _write_run(self) -> None:
        tokens, lengths = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._pending_tokens = [], 0
        first, count = self.counts.documents, len(lengths)
        buckets = self.buckets.of(np.arange(first, first + count), self.number)
        order = np.argsort(buckets, kind="stable")
        if self.buckets.count > 1:
            tokens, lengths = regroup(tokens, lengths, order), lengths[order]
        documents = np.searchsorted(buckets[order], np.arange(self.buckets.count + 1))
        token_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._bounds.append(np.stack([first + documents, self.counts.tokens + token_ends[documents]], axis=1))
        self._lengths.append(lengths)
        self._file.write(tokens.data)
        self.counts.documents += count
        self.counts.tokens += len(tokens)


class Spool:
    """A complete spool. Its files are open only while they are read: there may be thousands of spools.

    Raises:
        DataError: its files do not fit each other, as after a power failure.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_buckets: int):
        self.counts, self._path, self._dtype, self._num_buckets = read_counts(path), path, dtype, num_buckets
        lengths, bounds = self._load("lengths"), self._load("bounds")
        self._lengths_begin, self._bounds_begin, self._num_runs = lengths.offset, bounds.offset, len(bounds)
        if bounds.dtype != np.int64 or bounds.shape[1:] != (num_buckets + 1, 2) or lengths.dtype != np.int32:
            raise self._damaged()
        steps = np.diff(bounds.reshape(-1, 2), axis=0, prepend=0)
        if (steps < 0).any() or steps.sum(axis=0).tolist() != [len(lengths), self.counts.tokens]:
            raise self._damaged()

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents], in the order of the spool."""
        return self._load("lengths")

    def count_documents(self) -> np.ndarray:
        """Number of documents in each bucket, int64 [buckets]."""
        counts: np.ndarray = np.diff(self._load("bounds")[:, :, 0], axis=1).sum(axis=0)
        return counts

    def places(self) -> np.ndarray:
        """First document of each bucket in each run, and the end of the last, int64 [runs, buckets + 1]."""
        places: np.ndarray = np.asarray(self._load("bounds")[:, :, 0])
        return places

    def read(self, bucket: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokens and lengths of the documents of a bucket, and the place of the first of them.

        Run by run, in the order of the input.
        """
        names = (self._path.with_suffix(ending) for ending in (".tokens", ".lengths.npy", ".bounds.npy"))
        with ExitStack() as stack:
            token_file, length_file, bound_file = (stack.enter_context(name.open("rb")) for name in names)
            for run in range(self._num_runs):
                bound_file.seek(self._bounds_begin + (run * (self._num_buckets + 1) + bucket) * 16)
                document, token, document_end, token_end = np.fromfile(bound_file, np.int64, 4).tolist()
                if document_end > document:
                    length_file.seek(self._lengths_begin + document * 4)
                    lengths = np.fromfile(length_file, np.int32, document_end - document)
                    token_file.seek(token * self._dtype.itemsize)
                    tokens = np.fromfile(token_file, self._dtype, token_end - token)
                    if lengths.min() < 0 or not lengths.sum(dtype=np.int64) == len(tokens) == token_end - token:
                        raise self._damaged()
                    yield tokens, lengths, document

    def _load(self, name: str) -> np.memmap:
        return load_array(self._path.with_suffix(f".{name}.npy"), f"Delete {self._path.parent} and run again.")

    def _damaged(self) -> DataError:
        return DataError(f"{self._path}: is damaged. Delete {self._path.parent} and run again.")
