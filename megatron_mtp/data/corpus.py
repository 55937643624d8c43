"""One split of a `.bin/.idx` data set as samples of s+1 tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from megatron_mtp.config.blend import SPLITS, parse_split
from megatron_mtp.data.files import cached_array
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.randomness import derive_key, permute
from megatron_mtp.data.source import Sample, document_starts
from megatron_mtp.errors import DataError

logger = logging.getLogger(__name__)
_BLOCK_DOCUMENTS = 1 << 22  # documents permuted at a time, to bound memory


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
    ):
        self.reader, self.documents, self.which, self.targets = reader, documents, which, targets
        if targets is not None and not np.array_equal(targets.lengths, reader.lengths):
            raise DataError(
                f"{targets.prefix}: its {len(targets)} sequences have other lengths than the {len(reader)} of "
                f"{reader.prefix}, whose loss mask it is (dataset.loss_mask_suffix). Write one number for each token."
            )
        self.seq_length, self.eod, self.seed = seq_length, eod, seed
        self.name = f"{Path(reader.prefix).name}:{which}"
        self.num_tokens = reader.count_tokens(*documents)
        self.num_samples = (self.num_tokens - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"{reader.prefix}: its {which} split holds {self.num_tokens} tokens in {documents[1] - documents[0]} "
                f"of {len(reader)} documents, too few for one sample of {seq_length} + 1 tokens. Change dataset.split, "
                "reduce model.seq_length, add data"
                + (", or set validation.eval_iters = 0." if which == "valid" else ".")
            )
        self._index: np.ndarray | None = None

    def build_index(self, path_to_cache: str | None) -> None:
        """Builds the order of the documents and their first tokens, or loads them from the cache.

        Args:
            path_to_cache: folder; None: next to the prefix, or in memory if that folder cannot be written.
        """
        folder = Path(path_to_cache or f"{self.reader.prefix}_cache")
        path = folder / f"{Path(self.reader.prefix).name}-{self.which}-{self._cache_key():016x}.npy"
        try:
            self._index = cached_array(path, self._make_index)
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
            raise DataError(f"{path}: is damaged. Delete it, and it is built again.")

    def _is_own(self, index: np.ndarray) -> bool:
        """Whether an index from the cache fits the documents: a damaged one would give wrong samples."""
        (first, last), count = self.documents, self.documents[1] - self.documents[0]
        if index.shape != (2, count + 1) or index.dtype != np.int64 or index[1, 0] != 0:
            return False
        for begin in range(0, count, _BLOCK_DOCUMENTS):
            order, begins = (
                index[0, begin : min(begin + _BLOCK_DOCUMENTS, count)],
                index[1, begin : begin + _BLOCK_DOCUMENTS + 1],
            )
            if order.min() < first or order.max() >= last:
                return False
            if not np.array_equal(np.diff(begins), self.reader.lengths[order]):
                return False
        return True

    def read(self, sample: int) -> Sample:
        """Tokens [sample * s, sample * s + s + 1) of the shuffled documents."""
        assert self._index is not None, "build_index was not called"
        order, begins = self._index
        wanted = self.seq_length + 1
        place = int(np.searchsorted(begins, sample * self.seq_length, side="right")) - 1
        offset = sample * self.seq_length - int(begins[place])
        tokens, starts, filled = np.empty(wanted, np.int64), np.zeros(wanted, bool), 0
        is_target = None if self.targets is None else np.empty(wanted, bool)
        while filled < wanted:
            part = self.reader.read(int(order[place]), offset)[: wanted - filled]
            tokens[filled : filled + len(part)] = part
            if self.targets is not None and is_target is not None:
                is_target[filled : filled + len(part)] = self.targets.read(int(order[place]), offset, len(part))
            if offset == 0 and len(part):
                starts[filled] = True
            filled, place, offset = filled + len(part), place + 1, 0
        return Sample(tokens, starts | document_starts(tokens, self.eod), is_target)

    def _make_index(self) -> np.ndarray:
        """int64 [2, n+1]: documents in their random order (last entry unused), and the index of their first tokens."""
        first, last = self.documents
        count = last - first
        index = np.zeros((2, count + 1), np.int64)
        key = derive_key(self.seed, self.name, "documents")
        for begin in range(0, count, _BLOCK_DOCUMENTS):
            block = np.arange(begin, min(begin + _BLOCK_DOCUMENTS, count))
            index[0, block] = first + permute(block, count, key)
        np.cumsum(self.reader.lengths[index[0, :-1]], out=index[1, 1:])
        return index

    def _cache_key(self) -> int:
        """A hash of everything that the index depends on; the sequence length is not part of it."""
        files = [Path(f"{self.reader.prefix}{ending}").resolve() for ending in (".bin", ".idx")]
        state = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return derive_key("index 1", *state, *self.documents, self.seed, self.name)
