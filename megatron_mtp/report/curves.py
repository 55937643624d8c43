"""Curves of a run over four axes, and the reduced form in which a page draws them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from megatron_mtp.observe.run_log import RunLog

BUCKETS = 400
"""Points of a curve on the page. A longer curve is cut into this number of equal stretches of steps."""
AXES = {
    "iteration": "steps",
    "tokens": "training tokens",
    "hours": "hours in steps, without pauses, evaluations and saves",
    "flop": "FLOP of the model",
}
"""What the curves can be drawn against -> label."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps of a run.

    Args:
        iteration: ascending.
        value: at each of them; NaN and infinities included.
    """

    iteration: np.ndarray
    value: np.ndarray

    @property
    def num_bad(self) -> int:
        """Values that are not finite."""
        return int(np.sum(~np.isfinite(self.value)))

    def mean_of_last(self, count: int = 20) -> float | None:
        """Mean of the last finite values; None: there is none."""
        values = self.value[np.isfinite(self.value)][-count:]
        return float(values.mean()) if len(values) else None


@dataclass(frozen=True, slots=True)
class Reduced:
    """A curve in few points. Each is a stretch of steps: its mean, and its extremes, so that no spike is lost.

    Args:
        iteration: last step of each stretch, as the axes know it.
        mean, low, high: of the finite values; NaN where a stretch has none.
        bad: steps at which the value was not finite.
    """

    iteration: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bad: np.ndarray


def reduced(curve: Curve, buckets: int = BUCKETS) -> Reduced:
    """Cuts a curve into at most `buckets` stretches; a shorter curve keeps every point."""
    iteration, value = curve.iteration, curve.value
    finite = np.isfinite(value)
    bad = iteration[~finite]
    if len(iteration) <= buckets:
        shown = np.where(finite, value, np.nan)
        return Reduced(iteration, shown, shown, shown, bad)
    width = (iteration[-1] - iteration[0] + 1) / buckets
    bucket = np.floor((iteration - iteration[0]) / width).astype(int)
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    count = np.add.reduceat(finite.astype(int), first)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, value, 0.0), first) / count
    low = np.minimum.reduceat(np.where(finite, value, np.inf), first)
    high = np.maximum.reduceat(np.where(finite, value, -np.inf), first)
    empty = count == 0
    low[empty] = high[empty] = np.nan
    return Reduced(iteration[np.append(first[1:], len(iteration)) - 1], mean, low, high, bad)


@dataclass(frozen=True, slots=True)
class Axes:
    """Where a run was at each recorded step.

    Args:
        iteration: recorded steps, ascending.
        places: axis of `AXES` -> position at each of them. Missing if the log does not say it.
    """

    iteration: np.ndarray
    places: dict[str, np.ndarray]

    @classmethod
    def of(cls, log: RunLog) -> Axes:
        """The positions of all step records on each axis."""
        iteration, _ = log.column("iteration")
        places = {"iteration": iteration}
        tokens_at, tokens = log.column("consumed-tokens")
        if len(tokens):
            places["tokens"] = np.interp(iteration, tokens_at, tokens)
        time_at, time_ms = log.column("perf/iteration_time_ms")
        if len(time_ms):
            of_record = np.zeros_like(iteration)
            of_record[np.searchsorted(iteration, time_at)] = np.where(np.isfinite(time_ms), time_ms, 0.0)
            steps = np.diff(iteration, prepend=min(log.first.get("iteration", 0), iteration[0]))
            places["hours"] = np.cumsum(steps * of_record) / 3.6e6
        if "tokens" in places and (flop := flop_per_token(log)):
            places["flop"] = places["tokens"] * flop
        return cls(iteration, places)

    def at(self, axis: str, iteration: np.ndarray) -> np.ndarray:
        """Position at some steps; between two records it grows evenly, and it is 0 at step 0."""
        known, place = self.iteration, self.places[axis]
        if len(known) and known[0] > 0:
            known, place = np.append(0.0, known), np.append(0.0, place)
        return np.interp(iteration, known, place) if len(known) else np.zeros_like(iteration)


def flop_per_token(log: RunLog) -> float | None:
    """Forward and backward FLOP of one token, from two rates of a step; None: the log lacks them."""
    at, tflops = log.column("perf/tflops_per_device")
    tokens_at, tokens = log.column("perf/tokens_per_s_per_device")
    if not len(at) or not np.array_equal(at, tokens_at):
        return None
    ratio = (tflops * 1e12 / tokens)[np.isfinite(tflops) & (tokens > 0)]
    return float(np.median(ratio)) if len(ratio) else None


def curve(log: RunLog, name: str) -> Curve:
    """A logged metric, or `gap/mtp_k`: the loss of a depth minus the main loss."""
    if match := re.fullmatch(r"gap/(mtp_\d+)", name):
        at, loss = log.column(f"{match[1]} loss")
        main_at, main = log.column("lm loss")
        both, of_loss, of_main = np.intersect1d(at, main_at, assume_unique=True, return_indices=True)
        with np.errstate(invalid="ignore"):
            return Curve(both, loss[of_loss] - main[of_main])
    return Curve(*log.column(name))


def held_out(log: RunLog, name: str, metric: str) -> Curve:
    """A metric of a validation set."""
    found = [(e["iteration"], e[metric]) for e in log.evaluations if e["name"] == name and metric in e]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    return Curve(points[:, 0], points[:, 1])


def depths(log: RunLog) -> list[int]:
    """The MTP depths that the run trains: 1, 2, ..."""
    return sorted({int(match[1]) for name in log.names() if (match := re.fullmatch(r"mtp_(\d+) loss", name))})
