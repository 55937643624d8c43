"""Synthetic data: documents of a noisy Markov chain that a small model learns in seconds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_mtp.data.randomness import derive_key, permute, uniform
from megatron_mtp.data.source import Sample

NOISE = 0.1  # share of tokens that jump at random: the chain's entropy grows with the distance that is predicted
MAX_ACTIVE_IDS = 256  # a chain over few ids can be learned from few tokens


class MockSource:
    """An endless sequence of samples made from (seed, name, sample id).

    Each document walks a fixed cycle over the active ids, jumping to a random place with probability `NOISE`, and ends
    with `eod`; its length is about a third of a sample. Depth k predicts k+1 steps of the walk ahead, so its best loss
    rises with k.

    Args:
        vocab_size: ids lie below it.
        seq_length: s; samples have s+1 tokens.
        eod: id that ends a document and occurs nowhere else.
        name: of the split; splits share the cycle but not the samples.
    """

    num_samples = None

    def __init__(self, vocab_size: int, seq_length: int, eod: int, seed: int, name: str):
        self.seq_length, self.eod, self.seed, self.name = seq_length, eod, seed, name
        ids = np.delete(np.arange(min(vocab_size, MAX_ACTIVE_IDS + 1)), np.s_[eod : eod + 1])[:MAX_ACTIVE_IDS]
        self.cycle = ids[permute(np.arange(len(ids)), len(ids), derive_key(seed, "mock cycle"))]

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions, np.int64)

    def will_read(self, sample_ids: Iterable[int]) -> None:
        pass

    def read(self, sample_id: int) -> Sample:
        n = self.seq_length + 1
        index = np.arange(n)
        draws = [
            uniform(index, derive_key(self.seed, self.name, int(sample_id), what)) for what in ("jump", "to", "end")
        ]
        is_eod = draws[2] < 1.0 / max(4.0, self.seq_length / 3)
        is_eod[0] = False
        starts = np.concatenate([[False], is_eod[:-1]])
        jumps = (draws[0] < NOISE) | starts
        jumps[0] = True
        last_jump = np.maximum.accumulate(np.where(jumps, index, 0))
        landing = (draws[1] * len(self.cycle)).astype(np.int64)
        tokens = self.cycle[(landing[last_jump] + index - last_jump) % len(self.cycle)]
        return Sample(np.where(is_eod, self.eod, tokens), starts)

    def describe(self, sample_id: int) -> str:
        return f"mock data '{self.name}', sample {sample_id}"
