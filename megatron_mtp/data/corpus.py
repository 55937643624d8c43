"""One split of a `.bin/.idx` data set as samples of s+1 tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mtp.config.blend import SPLITS, parse_split
from megatron_mtp.data.data_file import StoredTable
from megatron_mtp.data.files import cached_array
from megatron_mtp.data.fim import NUM_SENTINELS, FillInTheMiddle
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.randomness import derive_key, permute
from megatron_mtp.data.source import Sample, document_starts
from megatron_mtp.errors import DataError

logger = logging.getLogger(__name__)
_BLOCK_DOCUMENTS = 1 << 22  # documents permuted at a time, to bound memory
_ANNOUNCED_DOCUMENTS = 1 << 10  # documents in object storage whose tokens are requested at a time
_STRIDE = 512  # documents between those whose first token is kept in memory


def split_range(split: str, which: str, num_documents: int) -> tuple[int, int]:
    """The documents [first, end) of a split, with Megatron's arithmetic and rounding.

    Args:
        split: shares as in dataset.split.
        which: one of `SPLITS`.

    Example: split_range("8,1,1", "valid", 20) -> (16, 18).
    """
    shares = np.array(parse_split(split))
    shares = (shares / np.sum(shares)).tolist()
    ends = [0.0]
    for share in shares:
        ends.append(ends[-1] + share)
    place = SPLITS.index(which)
    return round(ends[place] * num_documents), round(ends[place + 1] * num_documents)


class Corpus:
    """Samples of one prefix and split.

    The documents are shuffled by the seed and concatenated, then cut into samples of s+1 tokens; neighbouring samples
    share one token.

    Args:
        reader: the open files.
        documents: [first, end) of the split.
        which: name of the split, used in messages and in the random order.
        eod: end-of-document id; the next token starts a document, as the first token of each stored document does.
        targets: a data set of the same lengths with 0 where a token is no target; None: every token is a target.
        fim: rearranges some of the documents; None: all stay as they are stored.

    Raises:
        DataError: the split is too small for one sample, or `targets` has other lengths.
    """

    def __init__(
        self,
        reader: IndexedReader,
        documents: tuple[int, int],
        which: str,
        seq_length: int,
        eod: int,
        seed: int,
        targets: IndexedReader | None = None,
        fim: FillInTheMiddle | None = None,
    ):
        self.fim = fim
        self.reader, self.documents, self.which, self.targets = reader, documents, which, targets
        if targets is not None and not _same_lengths(targets, reader):
            raise DataError(
                f"{targets.prefix}: its {len(targets)} sequences have other lengths than the {len(reader)} of "
                f"{reader.prefix}, whose loss mask it is (dataset.loss_mask_suffix). Write one number for each token."
            )
        self.seq_length, self.eod, self.seed = seq_length, eod, seed
        self.name = f"{Path(reader.prefix).name}:{which}"
        self.num_tokens = reader.count_tokens(*documents) + self._num_sentinels()
        self.num_samples = (self.num_tokens - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"{reader.prefix}: its {which} split holds {self.num_tokens} tokens in {documents[1] - documents[0]} "
                f"of {len(reader)} documents, too few for one sample of {seq_length} + 1 tokens. Change dataset.split, "
                "reduce model.seq_length, add data"
                + (", or set validation.eval_iters = 0." if which == "valid" else ".")
            )
        self._index: np.ndarray | StoredTable | None = None
        self._begins = np.empty(0, np.int64)
        """Row 1 of the index at every _STRIDE-th column."""

    def _num_sentinels(self) -> int:
        """Tokens that fill-in-the-middle adds at least: a cut inside a token may add more, which the last remainder
        takes, so that the number of samples is known without reading."""
        if self.fim is None:
            return 0
        count = 0
        for begin, end in self._blocks(*self.documents):
            count += int(self.fim.chosen(np.arange(begin, end), self.reader.lengths(begin, end)).sum())
        return NUM_SENTINELS * count

    @staticmethod
    def _blocks(first: int, last: int, size: int = _BLOCK_DOCUMENTS) -> Iterator[tuple[int, int]]:
        for begin in range(first, last, size):
            yield begin, min(begin + size, last)

    def _added(self, fim: FillInTheMiddle, first: int, last: int) -> np.ndarray:
        """Tokens by which the documents [first, last) grow."""
        documents, stored = np.arange(first, last), self.reader.lengths(first, last)
        if self.is_remote and fim.cutter is not None:
            for document in documents[fim.chosen(documents, stored)].tolist():
                self.reader.will_read(document)
        return fim.added(documents, stored, self.reader.read)

    def build_index(self, path_to_cache: str | None) -> None:
        """Builds the order of the documents and their first tokens, or loads them from the cache.

        Args:
            path_to_cache: folder; None: next to the prefix (of an address: beside its blocks in the cache), or in
                memory if that folder cannot be written.
        """
        folder = Path(path_to_cache) if path_to_cache else self.reader.cache_folder
        path = folder / f"{Path(self.reader.prefix).name}-{self.which}-{self._cache_key():016x}.npy"
        remedy = "Delete it, and it is built again."
        try:
            cached_array(path, self._make_index)
            self._index = StoredTable(path, remedy)
        except OSError as error:
            if path_to_cache is not None:
                raise DataError(
                    f"dataset.path_to_cache = {path_to_cache!r}: cannot be written ({error.strerror}). Set a folder "
                    "that every node can write."
                ) from error
            logger.warning(
                "%s cannot be written (%s): the index stays in memory; set dataset.path_to_cache.",
                folder,
                error.strerror,
            )
            self._index = self._make_index()
        if not self._is_own(self._index):
            raise DataError(f"{path}: is damaged. {remedy}")

    def _is_own(self, index: np.ndarray | StoredTable) -> bool:
        """Whether an index from the cache fits the documents: a damaged one would give wrong samples.

        Keeps the part of it that `_find` starts from.
        """
        (first, last), count = self.documents, self.documents[1] - self.documents[0]
        if index.shape != (2, count + 1) or index[1, slice(0, 1)][0] != 0:
            return False
        lengths, kept = self.reader.lengths(first, last), []
        for begin in range(0, count, _BLOCK_DOCUMENTS):
            end = min(begin + _BLOCK_DOCUMENTS, count)
            order, begins = index[0, slice(begin, end)], index[1, slice(begin, end + 1)]
            if order.min() < first or order.max() >= last:
                return False
            stored, present = lengths[order - first], np.diff(begins)
            if not (np.array_equal(stored, present) if self.fim is None else self.fim.fits(order, stored, present)):
                return False
            kept.append(begins[:-1:_STRIDE].copy())
        self._begins = np.concatenate(kept)
        return True

    def _find(self, token: int) -> int:
        """The column of the index that holds the document of a token of the shuffled documents."""
        assert self._index is not None, "build_index was not called"
        column = (int(np.searchsorted(self._begins, token, side="right")) - 1) * _STRIDE
        begins = self._index[1, slice(column, column + _STRIDE)]
        return column + int(np.searchsorted(begins, token, side="right")) - 1

    def will_read(self, sample: int) -> None:
        """Announces a `read` of data in object storage, which then takes less time. Returns at once."""
        readers = [reader for reader in (self.reader, self.targets) if reader is not None]
        for document, offset, length, is_drawn in self._pieces(sample) if self.is_remote else ():
            for reader in readers:
                reader.will_read(document, *((0, None) if is_drawn else (offset, length)))

    @property
    def is_remote(self) -> bool:
        """Whether it is worthwhile to announce a `read`."""
        return self.reader.is_remote

    def _pieces(self, sample: int) -> Iterator[tuple[int, int, int, bool]]:
        """Document, first token in it, number of tokens, and whether the document is rearranged if it can be."""
        assert self._index is not None, "build_index was not called"
        begin, end = sample * self.seq_length, (sample + 1) * self.seq_length + 1
        first, last = self._find(begin), self._find(end - 1) + 1
        order, begins = self._index[0, slice(first, last)], self._index[1, slice(first, last + 1)]
        drawn = np.zeros(len(order), bool) if self.fim is None else self.fim.drawn(order)
        parts = zip(order.tolist(), begins[:-1].tolist(), begins[1:].tolist(), drawn.tolist(), strict=True)
        for document, document_begin, document_end, is_drawn in parts:
            low, high = max(begin, document_begin), min(end, document_end)
            if low < high:  # not an empty document
                yield document, low - document_begin, high - low, is_drawn

    def read(self, sample: int) -> Sample:
        """Tokens [sample * s, sample * s + s + 1) of the shuffled documents.

        Raises:
            DataError: a file was truncated or deleted, or cannot be read.
        """
        size = self.seq_length + 1
        tokens, starts = np.empty(size, np.int64), np.zeros(size, bool)
        is_target = None if self.targets is None and self.fim is None else np.ones(size, bool)
        filled = 0
        for document, offset, length, is_drawn in self._pieces(sample):
            place = slice(filled, filled + length)
            filled += length
            are_targets: np.ndarray | None
            if self.fim is not None and is_drawn and (stored := self._stored_length(document)) > 1:
                read_targets = None if self.targets is None else self.targets.read
                tokens[place], are_targets = self.fim.read(
                    document, stored, offset, length, self.reader.read, read_targets
                )
            else:
                tokens[place] = self.reader.read(document, offset, length)
                are_targets = None if self.targets is None else self.targets.read(document, offset, length)
            if is_target is not None and are_targets is not None:
                is_target[place] = are_targets
            starts[place.start] |= offset == 0
        return Sample(tokens, starts | document_starts(tokens, self.eod), is_target)

    def _stored_length(self, document: int) -> int:
        return int(self.reader.lengths(document, document + 1)[0])

    def _make_index(self) -> np.ndarray:
        """int64 [2, n+1]: documents in their random order (last entry unused), and the index of their first tokens."""
        first, last = self.documents
        count = last - first
        index = np.zeros((2, count + 1), np.int64)
        key = derive_key(self.seed, self.name, "documents")
        for begin in range(0, count, _BLOCK_DOCUMENTS):
            block = np.arange(begin, min(begin + _BLOCK_DOCUMENTS, count))
            index[0, block] = first + permute(block, count, key)
        lengths: np.ndarray = self.reader.lengths(first, last)
        if self.fim is not None:
            size = _ANNOUNCED_DOCUMENTS if self.is_remote else _BLOCK_DOCUMENTS
            lengths = lengths + np.concatenate([self._added(self.fim, *b) for b in self._blocks(first, last, size)])
        np.cumsum(lengths[index[0, :-1] - first], out=index[1, 1:])
        return index

    def _cache_key(self) -> int:
        """A hash of everything that the index depends on; the sequence length is not part of it."""
        state = [file.state for file in reversed(self.reader.files)]
        fim = [] if self.fim is None else self.fim.cache_parts()
        return derive_key("index 1", *state, *self.documents, self.seed, self.name, *fim)


def _same_lengths(one: IndexedReader, other: IndexedReader) -> bool:
    return len(one) == len(other) and np.array_equal(one.lengths(), other.lengths())
