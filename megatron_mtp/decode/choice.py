"""How many drafts a round should have, from acceptance and costs as they are measured.

A round with K drafts yields 1 + a_1 + a_1 a_2 + ... + a_1..a_K tokens and costs verify(K) + draft(K) seconds, where a_k is the conditional
acceptance of depth k. The best K has the most tokens per second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_mtp.decode.tensor_parallel import TensorParallel

# Rounds of each K before the first decision, and rounds between decisions.
PROBES = 3
EVERY = 32
# Weight of the past when a count or time is added: about the last hundred rounds matter.
KEEP = 0.99


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens of one round whose depths are accepted so, given the depths before.

    With acceptance 0.8 and 0.5: 1 + 0.8 + 0.8 * 0.5 = 2.2.
    """
    return 1.0 + sum(math.prod(acceptance[: k + 1]) for k in range(len(acceptance)))


def expected_speed_up(acceptance: Sequence[float], plain_s: float, round_s: float) -> float:
    """Plain decoding's seconds per token over drafting's.

    Args:
        plain_s: seconds of one token without drafts.
        round_s: seconds of one round: drafts, verification and bookkeeping.
    """
    return expected_tokens(acceptance) * plain_s / round_s


class DraftLength:
    """Chooses K for each round.

    Args:
        most: largest K.
        is_fixed: always `most`.
        tp: rank 0's clock decides for all ranks.
    """

    def __init__(self, most: int, *, is_fixed: bool, tp: TensorParallel):
        self.most, self.is_fixed, self.tp = most, is_fixed, tp
        self.rounds = 0
        self.best = most
        self.reached = [0.0] * most
        self.agreed = [0.0] * most
        self.seconds: dict[int, float] = {}
        """K -> seconds of one round."""
        self.totals: dict[str, float] = {}
        """Seconds of all rounds, by part."""
        self._spent = 0.0

    def next(self) -> int:
        """K of the next round. First every K is tried, the largest first, since it fills the caches of all depths."""
        if self.is_fixed or self.most == 0:
            return self.most
        round_number, self.rounds = self.rounds, self.rounds + 1
        if round_number < PROBES * (self.most + 1):
            return self.most - round_number // PROBES
        if round_number % EVERY == 0 or round_number == PROBES * (self.most + 1):
            self.best = self.tp.from_first(self.choose())
        return self.best

    def choose(self) -> int:
        """The K with the most tokens per second, by what is known now."""
        rates = {k: expected_tokens(self.acceptance[:k]) / self.seconds[k] for k in self.seconds}
        return max(rates, key=lambda k: rates[k])

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance of each depth; one half where nothing is known."""
        return [(a + 0.5) / (r + 1.0) for a, r in zip(self.agreed, self.reached, strict=True)]

    def add(self, count: int, accepted: int) -> None:
        """One row's outcome of a round with `count` drafts."""
        if self.is_fixed:
            return
        for k in range(min(count, accepted + 1)):
            self.reached[k] = self.reached[k] * KEEP + 1.0
            self.agreed[k] = self.agreed[k] * KEEP + (k < accepted)

    @contextmanager
    def timed(self, what: str, count: int) -> Iterator[None]:
        """Times a part of a round; "verify" is the last part. The smallest time of each K counts: others were disturbed."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self.totals[what] = self.totals.get(what, 0.0) + elapsed
        self._spent += elapsed
        if what == "verify":
            known = self.seconds.get(count, math.inf)
            self.seconds[count] = min(known, self._spent)
            self._spent = 0.0
