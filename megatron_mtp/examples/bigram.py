"""The baseline that a trained model must beat: a smoothed table of token pairs at distance d.

    p(b | a) = (c_d(a, b) + alpha * p(b)) / (c(a) + alpha),    p(b) = (c(b) + 1) / (N + v)

with c_d(a, b) the number of positions i with t[i] = a and t[i+d] = b. alpha has the lowest cross entropy on one tenth
of the training data, given the counts of the other nine tenths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.errors import DataError

_ALPHAS = 2.0 ** np.arange(-4, 17)


@dataclass(frozen=True, slots=True)
class BigramCounts:
    """Counts of pairs at one distance; pairs are numbered a * v + b and kept sparse.

    Args:
        vocab_size: v.
        pairs: [n] int64, sorted numbers of the pairs that occur.
        pair_counts: [n], how often each pair occurs.
        first_counts: [v], how often each token is the first of a pair.
        unigram: [v], smoothed share of each token as the second of a pair.
    """

    vocab_size: int
    pairs: np.ndarray
    pair_counts: np.ndarray
    first_counts: np.ndarray
    unigram: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, distance: int, vocab_size: int) -> BigramCounts:
        """Counts all pairs (t[i], t[i+distance]) of `tokens`, int [n]."""
        first, second = tokens[:-distance].astype(np.int64), tokens[distance:].astype(np.int64)
        pairs, pair_counts = np.unique(first * vocab_size + second, return_counts=True)
        unigram = (np.bincount(second, minlength=vocab_size) + 1.0) / (len(second) + vocab_size)
        return cls(vocab_size, pairs, pair_counts, np.bincount(first, minlength=vocab_size), unigram)

    def loss(self, tokens: np.ndarray, distance: int, alpha: float) -> float:
        """Mean cross entropy of t[i+distance] given t[i] over all positions of `tokens`, in nats per token."""
        first, second = tokens[:-distance].astype(np.int64), tokens[distance:].astype(np.int64)
        wanted = first * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        together = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
        share = (together + alpha * self.unigram[second]) / (self.first_counts[first] + alpha)
        return float(-np.log(share).mean())


def distance_bigram_loss(train_prefix: str, valid_prefix: str, distance: int, vocab_size: int) -> float:
    """Held-out cross entropy of t[i] -> t[i+distance] under the smoothed table, in nats per token.

    Depth k of a model predicts distance k+1. Pairs run across the ends of documents, as the model's targets do unless
    dataset.reset_attention_mask keeps documents apart.

    Args:
        train_prefix: indexed data set to fit the table on.
        valid_prefix: indexed data set to test it on.
        distance: 1 or more.
        vocab_size: token ids are below it.
    """
    documents = _documents(train_prefix)
    chosen = np.concatenate(documents[::10])
    rest = [document for place, document in enumerate(documents) if place % 10]
    alpha = 1.0  # a single document leaves no data to choose it on
    if rest and len(chosen) > distance:
        counts = BigramCounts.fit(np.concatenate(rest), distance, vocab_size)
        alpha = min(_ALPHAS, key=lambda alpha: counts.loss(chosen, distance, alpha))
    counts = BigramCounts.fit(np.concatenate(documents), distance, vocab_size)
    return counts.loss(np.concatenate(_documents(valid_prefix)), distance, alpha)


def unigram_loss(train_prefix: str, valid_prefix: str, vocab_size: int) -> float:
    """Held-out cross entropy of p(b), in nats per token: what can be known of a token without any other token.

    Args:
        train_prefix: indexed data set to count tokens in.
        valid_prefix: indexed data set to test on.
        vocab_size: token ids are below it.
    """
    tokens = np.concatenate(_documents(train_prefix))
    share = (np.bincount(tokens, minlength=vocab_size) + 1.0) / (len(tokens) + vocab_size)
    return float(-np.log(share[np.concatenate(_documents(valid_prefix))]).mean())


def _documents(prefix: str) -> list[np.ndarray]:
    reader = IndexedReader(prefix)
    documents = [reader.read(place) for place in range(len(reader))]
    if sum(map(len, documents)) < 2:
        raise DataError(f"{prefix}: has fewer than two tokens, too few for a bigram.")
    return documents
