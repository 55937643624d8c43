"""The statistical tool of all health signs: the level of a noisy series, and how well it is known.

A metric is a series with at most one value in a step. Its *level* is the median of its values in the last WINDOW_STEPS
steps, and of at least MIN_VALUES values. Its *noise* is the standard deviation of a single value about a smooth curve.
It is estimated from the differences of neighbours, in which a trend cancels: for independent normal noise the mean of
|x[t] - x[t-1]| is 2 / sqrt(pi) times the standard deviation. That mean is exponential, over about NOISE_VALUES
differences, and a difference counts at most OUTLIER times the present mean. So neither level nor noise follows a single
spike. The standard error of a level of n values is that of a median, sqrt(pi / 2) * noise / sqrt(n).

Two levels differ if they are SIGMAS standard errors of their difference apart. For independent values, normal or with
the heavy tails of Student's t with three degrees of freedom, one comparison in less than 10,000 exceeds that by chance
(a test counts them). A run makes many: so each sign also has a smallest effect in the unit of its metric, and must hold
in two windows in a row (`health.HealthMonitor`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mtp.observe.metrics import token_losses

WINDOW_STEPS = 20
"""A level is taken over this many steps."""
MIN_VALUES = 3
"""Values of a level whose metric is not measured in each step. They may be older than WINDOW_STEPS."""
MIN_DIFFERENCES = 2
"""Differences of neighbours without which nothing is known of the noise."""
NOISE_VALUES = 50
"""Differences over which the noise is averaged."""
OUTLIER = 2.5
"""A difference counts as at most this many times the mean."""
SIGMAS = 5.0
"""Standard errors that a difference of two levels must exceed."""
MAX_WINDOWS = 64
"""Windows of the history. Their distance grows with their age: over a million steps by a sixth from one to the next."""


@dataclass(frozen=True, slots=True)
class Level:
    """Level of a metric.

    Args:
        value: median over the window.
        error: its standard error.
        sigmas: standard errors by which a difference from another level counts. A sign that has begun is asked again
            with 0, so that it does not end and begin with the noise.
    """

    value: float
    error: float
    sigmas: float = SIGMAS

    def above(self, other: Level) -> float:
        """By how much this level is significantly above the other one; 0 or less if the difference may be noise."""
        return self.value - other.value - self.sigmas * math.hypot(self.error, other.error)

    def below(self, other: Level) -> float:
        """By how much this level is significantly below the other one; 0 or less if the difference may be noise."""
        return other.value - self.value - self.sigmas * math.hypot(self.error, other.error)

    def over(self, limit: float) -> bool:
        """Whether this level is significantly above a number."""
        return self.value - self.sigmas * self.error > limit


@dataclass(frozen=True, slots=True)
class Window:
    """Levels of all metrics at one step.

    Args:
        step: the last step of the window.
        metrics: name in the records -> level. `gap/mtp_k` is the loss of depth k minus the main loss, taken in each
            step: a hard batch raises both and leaves the gap alone. `log grad-norm` is the natural logarithm.
    """

    step: int
    metrics: dict[str, Level]

    @property
    def main(self) -> Level:
        """Level of the main loss."""
        return self.metrics["lm loss"]

    @property
    def mtp(self) -> dict[str, Level]:
        """`mtp_k loss` -> its level."""
        return {name: level for name, level in token_losses(self.metrics).items() if name != "lm loss"}

    @property
    def gap(self) -> dict[str, Level]:
        """`mtp_k loss` -> level of that loss minus the main loss."""
        return {name: self.metrics[gap_name(name)] for name in self.mtp}

    def relaxed(self) -> Window:
        """The same levels, whose differences from others all count."""
        return replace(self, metrics={name: replace(level, sigmas=0.0) for name, level in self.metrics.items()})


def gap_name(loss: str) -> str:
    """Name of the gap of an MTP loss, such as `gap/mtp_1`."""
    return f"gap/{loss.removesuffix(' loss')}"


@dataclass(slots=True)
class Series:
    """The last values of one metric, and its noise.

    Attributes:
        steps, values: newest last.
        difference: exponential mean of |difference of neighbours|.
        count: differences so far.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    difference: float = 0.0
    count: int = 0

    def add(self, step: int, value: float) -> None:
        """Adds the value of a step, which must be finite."""
        if self.values:
            self.count += 1
            found = abs(value - self.values[-1])
            if self.count > NOISE_VALUES / 10:  # at first the mean is not known well enough to judge a difference by it
                found = min(found, OUTLIER * self.difference or found)
            self.difference += (found - self.difference) / min(self.count, NOISE_VALUES)
        self.steps.append(step)
        self.values.append(value)
        while len(self.values) > MIN_VALUES and self.steps[0] <= step - WINDOW_STEPS:
            del self.steps[0], self.values[0]

    @property
    def noise(self) -> float:
        """Standard deviation of a single value about a smooth curve."""
        return self.difference * math.sqrt(math.pi) / 2

    def level(self) -> Level | None:
        """The present level; None: there are too few values."""
        if self.count < MIN_DIFFERENCES or len(self.values) < MIN_VALUES:
            return None
        return Level(statistics.median(self.values), self.noise * math.sqrt(math.pi / 2 / len(self.values)))

    def is_current(self, step: int) -> bool:
        """Whether the newest value still tells of `step`: its age is below the window, or twice the usual distance."""
        distance = (self.steps[-1] - self.steps[0]) / max(len(self.steps) - 1, 1)
        return step - self.steps[-1] < max(WINDOW_STEPS, 2 * distance)

    def as_list(self) -> list[Any]:
        """Plain data for JSON; the inverse is `of`."""
        return [list(self.steps), list(self.values), self.difference, self.count]

    @classmethod
    def of(cls, kept: Sequence[Any]) -> Series:
        """From what `as_list` returned."""
        steps, values, difference, count = kept
        return cls(list(steps), list(values), difference, count)


class Trends:
    """Every metric of a run as a series, and the levels that they had before."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self.history: list[Window] = []
        """Earlier windows that do not overlap, the oldest first."""

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step; those that are not finite are left out."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._series.setdefault(name, Series()).add(step, value)

    def height(self, name: str, value: float) -> float:
        """How far a value of a metric is above its level so far, in units of its noise; 0 while that is not known."""
        series = self._series.get(name)
        if series is None or series.count < WINDOW_STEPS or not series.noise:
            return 0.0
        return (value - statistics.median(series.values)) / series.noise

    def window(self, step: int) -> Window:
        """Levels of the metrics at `step`, the last one that was added, without those that have ended long ago."""
        levels = {
            name: level
            for name, series in self._series.items()
            if series.is_current(step) and (level := series.level()) is not None
        }
        return Window(step, levels)

    def keep(self, window: Window) -> None:
        """Adds a window to the history, unless it overlaps with the last one there."""
        if self.history and window.step - self.history[-1].step < WINDOW_STEPS:
            return
        levels = {name: Level(_six(level.value), _six(level.error)) for name, level in window.metrics.items()}
        self.history.append(Window(window.step, levels))
        if len(self.history) > MAX_WINDOWS:
            kept = self.history

            def gap_for_its_age(index: int) -> float:
                return (kept[index + 1].step - kept[index - 1].step) / (window.step - kept[index].step)

            del kept[min(range(1, len(kept) - 1), key=gap_for_its_age)]

    def state_dict(self) -> dict[str, Any]:
        """JSON values of bounded size."""
        names = dict.fromkeys(name for window in self.history for name in window.metrics)
        return {
            "series": {name: series.as_list() for name, series in self._series.items()},
            "history": {
                "steps": [window.step for window in self.history],
                "levels": {name: [_pair(window.metrics.get(name)) for window in self.history] for name in names},
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; nothing of it for an empty one."""
        self._series = {name: Series.of(kept) for name, kept in state.get("series", {}).items()}
        history = state.get("history", {"steps": [], "levels": {}})
        self.history = [
            Window(step, {name: Level(*pairs[i]) for name, pairs in history["levels"].items() if pairs[i]})
            for i, step in enumerate(history["steps"])
        ]


def _six(value: float) -> float:
    """Six digits are enough for a level, and short in JSON."""
    return float(f"{value:.6g}")


def _pair(level: Level | None) -> list[float] | None:
    return None if level is None else [level.value, level.error]
