"""Global batches made from a seed, the same at every layout, with the masks that break programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A fifth of the tokens begins a document.
DOCUMENT_RATE = 0.2
HOLE_RATE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """What a global batch is made of.

    Args:
        num_samples: of the global batch.
        seq_length: s.
        vocab_size: ids lie below it.
        num_depths: D.
        mask: a name in MASKS.
        micro_batch_size: of the reference; the masks that empty a micro-batch or a data-parallel rank count in it.
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
class WholeBatch:
    """tokens int64 [B, s+1]; base_mask [B, s], the validity of target t[j+1]; starts bool [B, s+1] or None: documents do not separate."""

    tokens: np.ndarray
    base_mask: np.ndarray
    starts: np.ndarray | None


def whole_batch(spec: BatchSpec, step: int = 0) -> WholeBatch:
    """The global batch of one step, before it is cut."""
    generator = np.random.default_rng([spec.seed, step])
    tokens = generator.integers(0, spec.vocab_size, (spec.num_samples, spec.seq_length + 1))
    starts = None
    if spec.mask == "documents":
        starts = generator.random(tokens.shape) < DOCUMENT_RATE
    return WholeBatch(tokens, MASKS[spec.mask](spec, generator).astype(np.float32), starts)


def _full(spec: BatchSpec, _: np.random.Generator) -> np.ndarray:
    return np.ones((spec.num_samples, spec.seq_length))


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
    """Every second micro-batch: with dp = 2 and this micro-batch size all that rank 1 holds, with dp = 4 ranks 1 and 3."""
    mask = _holes(spec, generator)
    mask.reshape(-1, 2, spec.micro_batch_size, spec.seq_length)[:, 1] = False
    return mask


def _empty_cp_rank(spec: BatchSpec, generator: np.random.Generator) -> np.ndarray:
    """The middle half and the D slots behind it: with cp = 2 all that rank 1 holds at every depth, with cp = 4 ranks 2 and 3."""
    mask = _holes(spec, generator)
    quarter = spec.seq_length // 4
    mask[:, quarter : 3 * quarter + spec.num_depths] = False
    return mask


MASKS: dict[str, Callable[[BatchSpec, np.random.Generator], np.ndarray]] = {
    "full": _full,
    "padded": _padded,
    "holes": _holes,
    "documents": _full,  # whole_batch draws where documents begin
    "empty_micro_batch": _empty_micro_batch,
    "empty_dp_rank": _empty_dp_rank,
    "empty_cp_rank": _empty_cp_rank,
}
