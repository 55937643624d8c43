"""Mixes data sets by weight: parses blends, and computes which data set each position of the mixture draws from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.order import epoch_samples
from megatron_mtp.data.source import Sample
from megatron_mtp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Blend:
    """Data sets to mix.

    Attributes:
        prefixes: of the files.
        weights: one for each prefix; None: its number of samples, so that an epoch of the mixture is an epoch of each.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(value: Any, field: str) -> Blend:
    """Reads a blend as Megatron writes it.

    Args:
        value: [[prefix, ...], [weight, ...] or None]; or a flat list of prefixes; or a flat list of weights and
            prefixes in turn (["0.7", "a", "0.3", "b"]).
        field: name of the config field, for messages.

    Raises:
        ConfigError: the value has none of these forms.
    """
    prefixes, weights = _take_apart(value)
    if not prefixes or not all(isinstance(prefix, str) for prefix in prefixes):
        raise ConfigError(
            f"{field} = {value!r}: give [[prefix, ...], [weight, ...]], [[prefix, ...], None], or a list of prefixes."
        )
    if len(set(prefixes)) < len(prefixes):
        raise ConfigError(f"{field} = {value!r}: a prefix occurs twice. Give it once, with the sum of its weights.")
    if weights is None:
        return Blend(tuple(prefixes), None)
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if len(numbers) != len(prefixes) or not all(0 <= n < math.inf for n in numbers) or sum(numbers) <= 0:
        raise ConfigError(
            f"{field}: weights {weights!r} must be {len(prefixes)} numbers, one for each prefix, none negative and "
            "not all 0."
        )
    kept = [(prefix, number) for prefix, number in zip(prefixes, numbers, strict=True) if number > 0]
    return Blend(tuple(p for p, _ in kept), tuple(n for _, n in kept))


def _take_apart(value: Any) -> tuple[list[Any], list[Any] | None]:
    """Prefixes and weights of a blend in any form; no prefixes if the value has none of the forms."""
    items = list(value) if isinstance(value, list | tuple) else []
    if items and isinstance(items[0], list | tuple):
        weights = items[1] if len(items) == 2 else None
        fits = len(items) <= 2 and (weights is None or isinstance(weights, list | tuple))
        return (list(items[0]), None if weights is None else list(weights)) if fits else ([], None)
    if items and len(items) % 2 == 0 and all(_is_number(item) for item in items[::2]):
        return items[1::2], items[::2]
    return items, None


def _is_number(item: Any) -> bool:
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return True


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

    def build_indices(self, path_to_cache: str | None) -> None:
        """Builds the index of each corpus or loads it from the cache. Call it before `read`."""
        for corpus in self.corpora:
            corpus.build_index(path_to_cache)

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
