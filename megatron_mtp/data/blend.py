"""Mixes data sets by weight: computes which data set each position of the mixture draws from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.order import epoch_samples
from megatron_mtp.data.source import Sample


def draw(positions: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The data set that each position draws from, and the index of the draw in that data set.

    Draw m of data set i is due at time (m + 1/2) / w_i, and draws are taken in order of time (Webster's apportionment,
    ties to the first data set). As with Megatron's greedy rule, every data set is always within about one draw of its
    share. Unlike that rule, this one computes any position directly, so a run resumes without a table of earlier draws.

    Args:
        positions: int64 [n].
        weights: positive.

    Returns:
        int64 [n] data sets and int64 [n] draws, both counted from 0.

    Example: weights (2, 1), positions 0..5 -> data sets [0 1 0 0 1 0], draws [0 0 1 2 1 3].
    """
    positions = np.asarray(positions, np.int64)
    w, total, slack = np.asarray(weights, np.float64), float(np.sum(weights)), len(weights) + 1
    first, last = int(positions.min()), int(positions.max())
    # By time t, each data set has between w * t - 1/2 and w * t + 1/2 draws due: this window holds all the positions.
    begin, end = (first - slack) / total, (last + 1 + slack) / total
    times, sets, draws, before = [], [], [], 0
    for i, weight in enumerate(w):
        low = max(0, int(weight * begin) - 1)
        numbers = np.arange(low, int(weight * end) + 2)
        due = (numbers + 0.5) / weight
        inside = (due >= begin) & (due <= end)
        before += low + int((due < begin).sum())
        times.append(due[inside])
        draws.append(numbers[inside])
        sets.append(np.full(len(draws[-1]), i))
    set_of, draw_of = np.concatenate(sets), np.concatenate(draws)
    in_order = np.lexsort((set_of, np.concatenate(times)))
    chosen = in_order[positions - before]
    return set_of[chosen], draw_of[chosen]


class BlendedSource:
    """An endless mixture of corpora: draw n from a corpus is sample n of its endless epochs, each a new permutation.

    Sample ids count through all corpora in the order of the blend.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float] | None, seed: int):
        self.corpora, self.seed = list(corpora), seed
        self.weights = list(weights) if weights is not None else [corpus.num_samples for corpus in corpora]
        self._first_id = np.cumsum([0] + [corpus.num_samples for corpus in corpora])
        self.num_samples = int(self._first_id[-1])

    def build_indices(self, path_to_cache: str | None) -> None:
        """Builds the index of each corpus or loads it from the cache. Call it before `read`."""
        for corpus in self.corpora:
            corpus.build_index(path_to_cache)

    @property
    def shares(self) -> list[float]:
        """Share of the draws that each corpus gets."""
        return [weight / sum(self.weights) for weight in self.weights]

    def once(self) -> BlendedSource:
        """The same corpora by their sizes: its first `num_samples` positions hold each sample once."""
        return BlendedSource(self.corpora, None, self.seed)

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        sets, draws = draw(positions, self.weights)
        ids = np.empty_like(sets)
        for i in np.unique(sets):
            corpus, mine = self.corpora[i], sets == i
            ids[mine] = self._first_id[i] + epoch_samples(draws[mine], corpus.num_samples, self.seed, corpus.name)
        return ids

    def read(self, sample_id: int) -> Sample:
        corpus, sample = self._find(sample_id)
        return corpus.read(sample)

    def describe(self, sample_id: int) -> str:
        corpus, sample = self._find(sample_id)
        return f"{corpus.reader.prefix}, {corpus.which} sample {sample}"

    def _find(self, sample_id: int) -> tuple[Corpus, int]:
        i = int(np.searchsorted(self._first_id, sample_id, side="right")) - 1
        return self.corpora[i], sample_id - int(self._first_id[i])
