"""The slice of a sequence that a context-parallel rank holds."""

from __future__ import annotations

import numpy as np


def zigzag_index(seq_length: int, cp_rank: int, cp_size: int) -> np.ndarray:
    """Positions in the full sequence of the slots of rank `cp_rank`, int64 [s/cp], in its local order.

    The sequence is cut into 2*cp chunks; rank r holds chunks r and 2*cp-1-r, so that causal attention costs every
    rank the same (Megatron-Core's order). s = 8, cp = 2: rank 0 holds [0 1 6 7], rank 1 holds [2 3 4 5].

    Args:
        seq_length: s, divisible by 2*cp_size if cp_size > 1.
    """
    if cp_size == 1:
        return np.arange(seq_length)
    assert seq_length % (2 * cp_size) == 0, f"sequence of {seq_length} does not divide into {2 * cp_size} chunks"
    chunk = seq_length // (2 * cp_size)
    first = np.arange(cp_rank * chunk, (cp_rank + 1) * chunk)
    mirrored = 2 * cp_size - 1 - cp_rank
    return np.concatenate([first, np.arange(mirrored * chunk, (mirrored + 1) * chunk)])


def zigzag_slice(array: np.ndarray, cp_rank: int, cp_size: int) -> np.ndarray:
    """`array` [..., s] -> [..., s/cp], sliced over the last axis."""
    if cp_size == 1:
        return array
    return array[..., zigzag_index(array.shape[-1], cp_rank, cp_size)]
