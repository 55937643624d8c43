"""Random numbers by position: any element of any stream, without state, equal on every machine and numpy release.

They define the order of the data. A resumed run, or one with another data-parallel size, computes the same order from
the position alone and keeps no index in memory.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Multipliers of splitmix64 (Steele, Lea, Flood 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 8  # 4 suffice for large halves; tiny data sets have halves of a bit or two


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for the stream with this name, such as (seed, "epoch", 3)."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_u64(values: np.ndarray, key: int) -> np.ndarray:
    """Mixes integers with a key into uniform uint64, elementwise."""
    x = values.astype(np.uint64) * _GOLDEN + np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def uniform(values: np.ndarray, key: int) -> np.ndarray:
    """float64 in [0, 1), elementwise from integers and a key."""
    return (hash_u64(values, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Applies the pseudo-random permutation `key` of range(size) to each index, int64.

    A Feistel network over the next power of four. A value outside the range is mapped again until it is inside, which
    keeps the map one to one. Needs constant memory for any size.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [derive_key(key, round_) for round_ in range(_FEISTEL_ROUNDS)]

    def cipher(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for round_key in keys:
            left, right = right, left ^ (hash_u64(right, round_key) & low)
        return (left << half) | right

    out = cipher(np.asarray(index).astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = cipher(out[outside])
    return out.astype(np.int64)
