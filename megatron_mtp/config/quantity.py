"""Counts written as people write them: "10B" tokens."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_mtp.config.knob import INT64_MAX
from megatron_mtp.errors import ConfigError, Problem

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def read_number[N: (int, float)](text: str, kind: type[N]) -> N:
    """The number that `text` writes in ASCII digits.

    Raises:
        ValueError: it writes none.
    """
    if not text.isascii():
        raise ValueError(f"{text!r} is no number")
    return kind(text)


def parse_quantity(value: int | str) -> int:
    """Turns "10B", "1.5T", "2_000", 2000 or "1e9" into a count. Suffixes are K, M, B (or G), T in powers of 1000.

    Raises:
        ConfigError: the text is no count, or the count is negative, not a whole number or above 64 bits.

    Example: parse_quantity("14.8T") == 14_800_000_000_000.
    """
    text = str(value).strip().upper().replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(E\+?\d{1,2})?\s*([KMBGT]?)", text, re.ASCII)
    if isinstance(value, bool) or match is None:
        rule = 'must be a whole number such as 5000, or one with a suffix such as "10B" or "1.5T"'
        raise ConfigError(Problem(value=value, rule=rule))
    number = Decimal(match.group(1) + (match.group(2) or "")) * SUFFIXES[match.group(3)]
    if number > INT64_MAX:
        raise ConfigError(Problem(value=value, rule="must be within 64 bits"))
    if number != int(number):
        raise ConfigError(Problem(value=value, rule=f"must be a whole number, and it is {number}"))
    return int(number)
