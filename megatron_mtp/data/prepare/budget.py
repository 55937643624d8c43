"""A budget of tokens: a random part of all documents that fits in it, chosen without holding them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mtp.data.prepare.spool import Spool
from megatron_mtp.data.randomness import derive_key, hash_u64
from megatron_mtp.errors import ConfigError, Problem

_BITS = 20
"""Documents are cut off in 2^20 groups, so the budget is filled but for about a millionth of all tokens."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The documents that are kept: those whose random group is below `groups`. The same at every number of workers."""

    groups: int

    @staticmethod
    def group(places: np.ndarray, spool: int) -> np.ndarray:
        """Random group of each document, given by its place in a spool, int64 [n]."""
        hashes = hash_u64(places, derive_key("max tokens", spool))
        return (hashes >> np.uint64(64 - _BITS)).astype(np.int64)

    @classmethod
    def of(cls, spools: Sequence[Spool], max_tokens: int) -> Budget:
        """The largest part of all documents that has at most `max_tokens` tokens.

        Raises:
            ConfigError: no document fits.
        """
        tokens = np.zeros(1 << _BITS, np.int64)
        for number, spool in enumerate(spools):
            lengths = spool.lengths()
            np.add.at(tokens, cls.group(np.arange(len(lengths)), number), lengths)
        total = np.cumsum(tokens)
        groups = int(np.searchsorted(total, max_tokens, side="right"))
        if groups == 0 or total[groups - 1] == 0:
            rule = f"is below the first of the documents, which have {int(total[-1]):,} tokens in total"
            raise ConfigError(Problem(fields=("--max-tokens",), value=max_tokens, rule=rule))
        return cls(groups)

    def keeps(self, places: np.ndarray, spool: int) -> np.ndarray:
        """Which documents are kept, bool [n]."""
        kept: np.ndarray = self.group(places, spool) < self.groups
        return kept

    def count_documents(self, spool: Spool, number: int) -> np.ndarray:
        """Number of kept documents in each bucket, int64 [buckets]."""
        kept = self.keeps(np.arange(spool.counts.documents), number)
        before = np.concatenate([[0], np.cumsum(kept)])[spool.places()]
        counts: np.ndarray = np.diff(before, axis=1).sum(axis=0)
        return counts


def kept_part(
    tokens: np.ndarray, lengths: np.ndarray, first: int, spool: int, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of the kept ones of some documents; `first` is the place of the first."""
    kept = budget.keeps(np.arange(first, first + len(lengths)), spool)
    return tokens[np.repeat(kept, lengths)], lengths[kept]
