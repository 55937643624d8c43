"""Samples made from a seed, the same at every layout, with loss masks that programs often get wrong.

The data package makes micro-batches of them as it does of a run's data, so `verify` covers it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_mtp.data.source import Sample

DOCUMENT_RATE = 0.2  # share of the tokens that begin a document
HOLE_RATE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """The contents of a global batch.

    Attributes:
        num_samples: samples in the global batch, B.
        seq_length: s.
        vocab_size: token ids are below it.
        num_depths: D.
        mask: a name in MASKS.
        micro_batch_size: of the reference run; the masks that empty a micro-batch or a data-parallel rank use it.
        seed: of tokens and masks.
    """

    num_samples: int
    seq_length: int
    vocab_size: int
    num_depths: int
    mask: str = "full"
    micro_batch_size: int = 2
    seed: int = 5


@dataclass(frozen=True, slots=True)
class ArraySource:
    """A SampleSource over arrays: position n holds row n.

    Attributes:
        tokens: int64 [n, s+1].
        base_mask: [n, s], whether the target t[j+1] of slot j counts.
        starts: bool [n, s+1], true where a token begins a document.
    """

    tokens: np.ndarray
    base_mask: np.ndarray
    starts: np.ndarray

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def will_read(self, sample_ids: Iterable[int]) -> None:
        pass

    def read(self, sample_id: int) -> Sample:
        is_target = np.concatenate([[True], self.base_mask[sample_id] != 0])
        return Sample(self.tokens[sample_id], self.starts[sample_id], is_target)

    @property
    def num_samples(self) -> int:
        """Rows."""
        return len(self.tokens)

    def describe(self, sample_id: int) -> str:
        return f"generated sample {sample_id}"


def seeded_samples(spec: BatchSpec, step: int = 0) -> ArraySource:
    """The samples of the global batch of one step."""
    generator = np.random.default_rng([spec.seed, step])
    tokens = generator.integers(0, spec.vocab_size, (spec.num_samples, spec.seq_length + 1))
    starts = np.zeros(tokens.shape, bool)
    if spec.mask == "documents":
        starts = generator.random(tokens.shape) < DOCUMENT_RATE
    return ArraySource(tokens, MASKS[spec.mask](spec, generator), starts)


def _full(spec: BatchSpec, _: np.random.Generator) -> np.ndarray:
    return np.ones((spec.num_samples, spec.seq_length), bool)


def _padded(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    lengths = generator.integers(1, spec.seq_length + 1, (spec.num_samples, 1))
    return np.arange(spec.seq_length) < lengths


def _holes(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    return generator.random((spec.num_samples, spec.seq_length)) >= HOLE_RATE


def _empty_micro_batch(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    mask = _holes(spec, generator)
    mask[spec.micro_batch_size : 2 * spec.micro_batch_size] = False
    return mask


def _empty_dp_rank(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    """Empties every second micro-batch: all of rank 1's with dp = 2, and all of ranks 1 and 3 with dp = 4."""
    mask = _holes(spec, generator)
    mask.reshape(-1, 2, spec.micro_batch_size, spec.seq_length)[:, 1] = False
    return mask


def _empty_cp_rank(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    """Empties the middle half and the D slots after it: all of rank 1's with cp = 2, of ranks 2 and 3 with cp = 4."""
    mask = _holes(spec, generator)
    quarter = spec.seq_length // 4
    mask[:, quarter : 3 * quarter + spec.num_depths] = False
    return mask


MASKS: dict[str, Callable[[BatchSpec, np.random.Generator], np.ndarray]] = {
    "full": _full,
    "padded": _padded,
    "holes": _holes,
    "documents": _full,  # seeded_samples draws where documents begin
    "empty_micro_batch": _empty_micro_batch,
    "empty_dp_rank": _empty_dp_rank,
    "empty_cp_rank": _empty_cp_rank,
}
