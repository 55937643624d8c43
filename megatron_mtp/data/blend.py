"""Mixes data sets by weight: computes which data set each position of the mixture draws from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.order import epoch_samples
from megatron_mtp.data.source import Sample


def draw(
    positions: np.ndarray, weights: Sequence[float], limits: Sequence[int | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The data set that each position draws from, and the index of the draw in that data set.

    Draw m of data set i is due at time (m + 1/2) / w_i, and draws are taken in order of time (Webster's apportionment,
    ties to the first data set). As with Megatron's greedy rule, every data set is always within about one draw of its
    share. Unlike that rule, this one computes any position directly, so a run resumes without a table of earlier draws.
    A data set that has given all its draws is passed over, so that the others take its place by their weights.

    Args:
        positions: int64 [n].
        weights: positive.
        limits: draws that a data set gives at most; None: any number. At least one has no limit.

    Returns:
        int64 [n] data sets and int64 [n] draws, both counted from 0.

    Example: weights (2, 1), positions 0..5 -> data sets [0 1 0 0 1 0], draws [0 0 1 2 1 3]; with a limit of 2 for the
    first one, data sets [0 1 0 1 1 1].
    """
    positions = np.asarray(positions, np.int64)
    slack, most = len(weights) + 1, limits or [None] * len(weights)
    first, last = int(positions.min()), int(positions.max())
    # By time t, each data set has between w * t - 1/2 and w * t + 1/2 draws due: this window holds all the positions.
    begin, end = (due_time(count, weights, most) for count in (first - slack, last + 1 + slack))
    times, sets, draws, before = [], [], [], 0
    for i, (weight, limit) in enumerate(zip(np.asarray(weights, np.float64), most, strict=True)):
        low, high = max(0, int(weight * begin) - 1), int(weight * end) + 2
        if limit is not None:
            low, high = min(low, limit), min(high, limit)
        numbers = np.arange(low, high)
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


def due_time(count: float, weights: Sequence[float], limits: Sequence[int | None]) -> float:
    """The time by which about `count` draws are due: the sum over data sets of min(w * t, limit)."""
    time, done = 0.0, 0.0
    ends = sorted((limit / weight, i) for i, (weight, limit) in enumerate(zip(weights, limits, strict=True)) if limit)
    spent = {i for i, limit in enumerate(limits) if limit == 0}
    for end, i in ends:
        rate = sum(weight for k, weight in enumerate(weights) if k not in spent)
        if done + (end - time) * rate >= count:
            break
        done, time = done + (end - time) * rate, end
        spent.add(i)
    return time + (count - done) / float(np.sum([weight for k, weight in enumerate(weights) if k not in spent]))


class BlendedSource:
    """An endless mixture of corpora: draw n from a corpus is sample n of its endless epochs, each a new permutation.

    Sample ids count through all corpora in the order of the blend.

    Args:
        limits: samples that are drawn from each corpus at most, see `draw`; None: any number of any.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float] | None,
        seed: int,
        limits: Sequence[int | None] | None = None,
    ):
        self.corpora, self.seed, self.limits = list(corpora), seed, limits
        self.weights = list(weights) if weights is not None else [corpus.num_samples for corpus in corpora]
        self._first_id = np.cumsum([0] + [corpus.num_samples for corpus in corpora])
        self.num_samples = int(self._first_id[-1])
        self._is_remote = any(corpus.is_remote for corpus in self.corpora)

    def build_indices(self, path_to_cache: str | None) -> None:
        """Builds the index of each corpus or loads it from the cache. Call it before `read`."""
        for corpus in self.corpora:
            corpus.build_index(path_to_cache)

    def expected_draws(self, count: int) -> list[float]:
        """How many of the first `count` draws each corpus gets, but for one."""
        limits = self.limits or [None] * len(self.weights)
        time = due_time(count, self.weights, limits)
        drawn = [weight * time for weight in self.weights]
        return [min(n, most) if most is not None else n for n, most in zip(drawn, limits, strict=True)]

    @property
    def shares(self) -> list[float]:
        """Share of the draws that each corpus gets while none has reached its limit."""
        return [weight / sum(self.weights) for weight in self.weights]

    def once(self) -> BlendedSource:
        """The same corpora by their sizes: its first `num_samples` positions hold each sample once."""
        return BlendedSource(self.corpora, None, self.seed)

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        sets, draws = draw(positions, self.weights, self.limits)
        ids = np.empty_like(sets)
        for i in np.unique(sets):
            corpus, mine = self.corpora[i], sets == i
            ids[mine] = self._first_id[i] + epoch_samples(draws[mine], corpus.num_samples, self.seed, corpus.name)
        return ids

    def will_read(self, sample_ids: Iterable[int]) -> None:
        for sample_id in sample_ids if self._is_remote else ():
            corpus, sample = self._find(sample_id)
            corpus.will_read(sample)

    def read(self, sample_id: int) -> Sample:
        corpus, sample = self._find(sample_id)
        return corpus.read(sample)

    def describe(self, sample_id: int) -> str:
        corpus, sample = self._find(sample_id)
        return f"{corpus.reader.prefix}, {corpus.which} sample {sample}"

    def _find(self, sample_id: int) -> tuple[Corpus, int]:
        i = int(np.searchsorted(self._first_id, sample_id, side="right")) - 1
        return self.corpora[i], sample_id - int(self._first_id[i])
