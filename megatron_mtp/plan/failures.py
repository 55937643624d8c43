"""How failures stretch a training: expected time, the best interval between saves, and spare nodes.

A job fails at random with a mean time between failures (MTBF) M. It then restarts, which takes R, from its last save,
and repeats what it computed since. A save stops the training for a time D. Failures may happen at any of these times.

Sources: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; J. T. Daly, A
higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22,
2006: equation 20 for the expected time, 37 for the interval.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

MAX_EXPONENT = 600.0
"""An exponent above it means that no interval between failures is long enough to make progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """What failures and saves cost a job.

    Args:
        mtbf_s: mean time between failures of the whole job; infinite: it never fails.
        save_s: time that training stands still for one save.
        restart_s: from a failure to the first step after it: detection, new processes, loading.
    """

    mtbf_s: float
    save_s: float
    restart_s: float

    def expected_s(self, work_s: float, interval_s: float) -> float:
        """Expected time of `work_s` seconds of training that is saved after every `interval_s` of it.

        Daly's equation: M exp(R / M) (exp((T + D) / M) - 1) work / T, exact for failures without memory.
        """
        segments = work_s / interval_s
        if math.isinf(self.mtbf_s):
            return segments * (interval_s + self.save_s)
        exponent = (interval_s + self.save_s) / self.mtbf_s
        if exponent + self.restart_s / self.mtbf_s > MAX_EXPONENT:
            return math.inf
        return self.mtbf_s * math.exp(self.restart_s / self.mtbf_s) * math.expm1(exponent) * segments

    def goodput(self, interval_s: float) -> float:
        """Share of the time that ends up as progress."""
        return 1 / self.expected_s(1.0, interval_s)

    def young_s(self) -> float:
        """Young's interval, the first approximation: sqrt(2 D M)."""
        return math.sqrt(2 * self.save_s * self.mtbf_s)

    def daly_s(self) -> float:
        """Daly's interval, the next terms of the series; M itself where saves take more than two of them."""
        if self.save_s >= 2 * self.mtbf_s:
            return self.mtbf_s
        part = self.save_s / (2 * self.mtbf_s)
        return self.young_s() * (1 + math.sqrt(part) / 3 + part / 9) - self.save_s

    def best_interval_s(self) -> float:
        """The interval of the shortest expected time; infinite without failures.

        The derivative of `expected_s` is zero where (1 - x) exp(x) = exp(-D / M) with x = T / M. The left side falls
        from 1 to 0 as x goes from 0 to 1.
        """
        if math.isinf(self.mtbf_s):
            return math.inf
        target, low, high = -self.save_s / self.mtbf_s, 0.0, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            if middle < 1 and math.log1p(-middle) + middle > target:
                low = middle
            else:
                high = middle
        return high * self.mtbf_s

    def simulate_s(self, work_s: float, interval_s: float, runs: int, seed: int = 0) -> list[float]:
        """Times of `runs` trainings with failures drawn at random, shortest first.

        The work is saved in equal pieces, the last one too, so the interval is shortened until they fit.
        """
        rng, pieces = random.Random(seed), math.ceil(work_s / interval_s - 1e-9)
        return sorted(self._one_run_s(pieces, work_s / pieces + self.save_s, rng) for _ in range(runs))

    def _one_run_s(self, pieces: int, piece_s: float, rng: random.Random) -> float:
        time = start = 0.0
        while True:
            until_failure = rng.expovariate(1 / self.mtbf_s) if math.isfinite(self.mtbf_s) else math.inf
            if until_failure >= (needed := start + pieces * piece_s):
                return time + needed
            time += until_failure
            pieces -= max(0, int((until_failure - start) // piece_s))
            start = self.restart_s


def spare_nodes(num_nodes: int, node_mtbf_s: float, repair_s: float, confidence: float = 0.99) -> int:
    """Spare nodes with which a job of `num_nodes` has all it needs at a random time with probability `confidence`.

    Broken nodes come at a rate of num_nodes / node_mtbf_s and stay away for repair_s, so their number has Poisson's
    distribution.
    """
    mean = num_nodes * repair_s / node_mtbf_s
    if mean > 500:  # a normal distribution is as good, and no term underflows
        return math.ceil(mean + 2.326 * math.sqrt(mean))
    spares, term = 0, math.exp(-mean)
    reached = term
    while reached < confidence:
        spares += 1
        term *= mean / spares
        reached += term
    return spares
