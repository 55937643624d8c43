"""Chooses the number of drafts per round from measured acceptance and costs.

A round with K drafts yields 1 + a_1 + a_1 a_2 + ... + a_1..a_K tokens and takes verify(K) + draft(K) seconds, where a_k
is the conditional acceptance of depth k. The best K has the most tokens per second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_mtp.decode.tensor_parallel import TensorParallel

PROBES = 3
"""Rounds with each K before the first decision."""
EVERY = 32
"""Rounds between decisions."""
KEEP = 0.99
"""Weight of older counts when a new one is added: about the last hundred rounds matter."""


def conditional_acceptance(reached: Sequence[int], agreed: Sequence[int]) -> list[float]:
    """agreed / reached of each depth; NaN if a depth was never reached."""
    return [a / r if r else math.nan for a, r in zip(agreed, reached, strict=True)]


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Expected tokens per round, given the conditional acceptance of each depth.

    With acceptance 0.8 and 0.5: 1 + 0.8 + 0.8 * 0.5 = 2.2.
    """
    return 1.0 + sum(math.prod(acceptance[: k + 1]) for k in range(len(acceptance)))


def expected_speed_up(acceptance: Sequence[float], plain_s: float, round_s: float) -> float:
    """Seconds per token of plain decoding divided by those with drafts.

    Args:
        plain_s: seconds per token without drafts.
        round_s: seconds per round, with bookkeeping.
    """
    return expected_tokens(acceptance) * plain_s / round_s


class DraftLength:
    """Chooses K for each round.

    Args:
        most: largest K.
        is_fixed: always use `most`.
        tp: rank 0's clock decides for all ranks.
    """

    def __init__(self, most: int, *, is_fixed: bool, tp: TensorParallel):
        self.most, self.is_fixed, self.tp = most, is_fixed, tp
        self.rounds = 0
        self.best = most
        self.reached = [0.0] * most
        self.agreed = [0.0] * most
        self.seconds: dict[int, float] = {}
        """K -> smallest seconds of a round."""
        self.totals: dict[str, float] = {}
        """Part of a round -> its seconds over all rounds."""
        self._spent = 0.0

    def next(self) -> int:
        """K of the next round. First every K is tried, the largest first because it fills the caches of all depths."""
        if self.is_fixed or self.most == 0:
            return self.most
        round_number, self.rounds = self.rounds, self.rounds + 1
        if round_number < PROBES * (self.most + 1):
            return self.most - round_number // PROBES
        if round_number % EVERY == 0 or round_number == PROBES * (self.most + 1):
            self.best = self.tp.from_first(self.choose())
        return self.best

    def choose(self) -> int:
        """The K with the most tokens per second so far."""
        rates = {k: expected_tokens(self.acceptance[:k]) / self.seconds[k] for k in self.seconds}
        return max(rates, key=lambda k: rates[k])

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance of each depth; 0.5 before anything is measured."""
        return [(a + 0.5) / (r + 1.0) for a, r in zip(self.agreed, self.reached, strict=True)]

    def add(self, count: int, accepted: int) -> None:
        """Adds one row's outcome of a round with `count` drafts."""
        if self.is_fixed:
            return
        for k in range(min(count, accepted + 1)):
            self.reached[k] = self.reached[k] * KEEP + 1.0
            self.agreed[k] = self.agreed[k] * KEEP + (k < accepted)

    @contextmanager
    def timed(self, what: str, count: int) -> Iterator[None]:
        """Times a part of a round; "verify" is the last part. The smallest time of each K counts."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self.totals[what] = self.totals.get(what, 0.0) + elapsed
        self._spent += elapsed
        if what == "verify":
            known = self.seconds.get(count, math.inf)
            self.seconds[count] = min(known, self._spent)
            self._spent = 0.0
