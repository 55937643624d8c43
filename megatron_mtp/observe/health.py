"""Watches the metrics of a run for warning signs: says once when one begins, with evidence and advice, and once when it
ends.

A sign is a function `(history, now) -> what is wrong or None` over windows of levels (`trends`); `signs` has those of
every run. A sign of your own:

    def grad_norm_grows(history: Sequence[Window], now: Window) -> str | None:
        if history and now.metrics["grad-norm"].above(history[0].metrics["grad-norm"]) > 10:
            return "the gradient norm grew by more than 10. Lower optimizer.lr."
        return None

    HealthMonitor({**built_in_signs(1), "grad norm grows": grad_norm_grows})

Signs are asked every EVERY_STEPS steps. One begins when it holds BEGIN times in a row, and ends when it does not hold
END times in a row, so with windows of 20 steps it is reported 30 to 40 steps after what causes it. While it is active
it is asked with levels whose noise does not count (`trends.Level.sigmas`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from megatron_mtp.observe.metrics import token_losses
from megatron_mtp.observe.signs import LOOKS, MEMORISING_NATS, Sign, built_in_signs
from megatron_mtp.observe.trends import Level, Trends, Window, gap_name

EVERY_STEPS = 10
"""Steps between two looks at the signs."""
BEGIN, END = 2, 3
"""Looks in a row at which a sign holds until it begins, or does not hold until it ends."""
NOT_FINITE_STEPS = 20
"""Steps without a number that is not finite after which that sign ends."""
SPIKES, SPIKE_STEPS = 5, 50
"""That many spikes in that many steps are a sign."""
SPIKE_HEIGHT, LOW_SPIKE_HEIGHT = 8.0, 4.0
"""Height of a spike above the level, in units of the noise: before the sign, and while it is active, since spikes that
go on raise the noise. That differs from `train.spike_sigmas`, which chooses the steps that a policy is applied to."""
UNWATCHED = re.compile(r"_(layer|stage)_\d+$")
"""Metrics of one layer or stage, of which the largest is a metric too: their trends would fill the checkpoint."""
REMEDIES = (
    "If it stays so, go back to the last good checkpoint with a lower optimizer.lr, optimizer.clip_grad = 1.0 or less, "
    "precision.dtype = bf16 instead of fp16, or model.mtp_loss_scaling_factor lowered to 0.05."
)


@dataclass(frozen=True, slots=True)
class SignEvent:
    """A sign begins or ends.

    Args:
        sign: its name.
        iteration: of the step after which it was seen.
        begins: whether it begins.
        text: evidence and advice, or how long it lasted.
    """

    sign: str
    iteration: int
    begins: bool
    text: str


@dataclass(slots=True)
class _Active:
    """What the monitor remembers of a sign.

    Attributes:
        since: iteration at which it began; None: it is not active.
        looks: looks in a row that speak for a change.
    """

    since: int | None = None
    looks: int = 0


@dataclass(slots=True)
class _Lowest:
    """Lowest loss of a validation set, and what was then: iteration, level of the training loss and its error."""

    loss: float
    iteration: int
    train: float
    error: float


@dataclass(slots=True)
class HealthMonitor:
    """Watches the metrics of a run.

    Args:
        signs: name -> sign.
    """

    signs: Mapping[str, Sign] = field(default_factory=lambda: built_in_signs(0))
    _trends: Trends = field(default_factory=Trends)
    _states: dict[str, _Active] = field(default_factory=dict)
    _spikes: list[int] = field(default_factory=list)
    _last_bad: int = -1
    _last_high: int = -1
    _lowest: dict[str, _Lowest] = field(default_factory=dict)

    def check(self, iteration: int, metrics: Mapping[str, float]) -> list[SignEvent]:
        """Adds the metrics of one step.

        Args:
            iteration: the step.
            metrics: value by name; `lm loss` and `mtp_k loss` in nats per token.

        Returns:
            The signs that begin or end with it.
        """
        bad, values = _not_finite(metrics), _watched(metrics)
        found = self._not_finite(iteration, bad) + self._spike(iteration, values if not bad else {})
        if not bad and "lm loss" in metrics:
            self._trends.add(iteration, values)
        if iteration % EVERY_STEPS:
            return found
        window = self._trends.window(iteration)
        if "lm loss" not in window.metrics:
            return found
        relaxed: Window | None = None
        for name, sign in self.signs.items():
            now = window
            if self._state(name).since is not None:
                now = relaxed = relaxed or window.relaxed()
            found += self._look(name, iteration, sign(self._trends.history, now))
        self._trends.keep(window)
        return found

    def check_evaluation(self, name: str, iteration: int, losses: Mapping[str, float]) -> list[SignEvent]:
        """Adds the losses of one validation set: memorising is a rise there while the training loss falls."""
        loss, train = losses.get("lm loss", math.nan), self._trends.window(iteration).metrics.get("lm loss")
        if not math.isfinite(loss) or train is None:
            return []
        lowest = self._lowest.get(name)
        if lowest is None or loss <= lowest.loss:
            self._lowest[name] = lowest = _Lowest(loss, iteration, train.value, train.error)
        is_better = train.below(Level(lowest.train, lowest.error)) > 0
        text = None
        if loss > lowest.loss + MEMORISING_NATS and is_better:
            text = (
                f"lm loss on {name} rose from {lowest.loss:.3f} (iteration {lowest.iteration}) to {loss:.3f} while it "
                f"fell from {lowest.train:.3f} to {train.value:.3f} in training: the model learns its data by heart. "
                "Use more data or fewer epochs, a smaller model, more optimizer.weight_decay; checkpoint.keep_best "
                "keeps the checkpoint with the lowest validation loss."
            )
        return self._look(f"memorising: {name}", iteration, text)

    @property
    def active(self) -> list[str]:
        """Names of the signs that have begun and are not over."""
        return [name for name, state in self._states.items() if state.since is not None]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on as if it had not stopped, as JSON values."""
        return {
            "trends": self._trends.state_dict(),
            "active": {name: [one.since, one.looks] for name, one in self._states.items() if one != _Active()},
            "spikes": list(self._spikes),
            "last_bad": self._last_bad,
            "last_high": self._last_high,
            "lowest": {n: [one.loss, one.iteration, one.train, one.error] for n, one in self._lowest.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; nothing of it for an empty one, or for one of a release up to 0.1,
        whose windows had means of fixed stretches."""
        if "trends" not in state:
            state = {}
        self._trends.load_state_dict(state.get("trends", {}))
        self._states = {name: _Active(*kept) for name, kept in state.get("active", {}).items()}
        self._spikes = list(state.get("spikes", []))
        self._last_bad, self._last_high = state.get("last_bad", -1), state.get("last_high", -1)
        self._lowest = {name: _Lowest(*kept) for name, kept in state.get("lowest", {}).items()}

    def _state(self, name: str) -> _Active:
        return self._states.setdefault(name, _Active())

    def _look(self, name: str, iteration: int, text: str | None) -> list[SignEvent]:
        """Counts one look at a sign."""
        state = self._state(name)
        changes = (text is None) == (state.since is not None)
        state.looks = state.looks + 1 if changes else 0
        if state.looks < (LOOKS.get(name, BEGIN) if state.since is None else END):
            return []
        return [self._change(name, iteration, text)]

    def _change(self, name: str, iteration: int, text: str | None) -> SignEvent:
        state = self._state(name)
        if text is not None:
            state.since, state.looks = iteration, 0
            return SignEvent(name, iteration, True, f"iteration {iteration}: {text}")
        lasted = f"iteration {iteration}: the sign '{name}' is over; it was reported at iteration {state.since}."
        state.since, state.looks = None, 0
        return SignEvent(name, iteration, False, lasted)

    def _not_finite(self, iteration: int, bad: str | None) -> list[SignEvent]:
        if bad:
            self._last_bad = iteration
        is_over = iteration - self._last_bad >= NOT_FINITE_STEPS
        return self._switch("not finite", iteration, bad, is_over=is_over)

    def _spike(self, iteration: int, values: Mapping[str, float]) -> list[SignEvent]:
        """The sign of many spikes; looks at the losses and the gradient norm before they are part of the trends.

        Steps in a row count as one spike: a loss that stays high has left its level.
        """
        least = SPIKE_HEIGHT if self._state("spikes").since is None else LOW_SPIKE_HEIGHT
        names = [*token_losses(values), "log grad-norm"]
        heights = {name: self._trends.height(name, values[name]) for name in names if name in values}
        name = max(heights, key=lambda name: heights[name], default="")
        text, before = None, self._last_high
        if name and heights[name] > LOW_SPIKE_HEIGHT:
            self._last_high = iteration
        if name and heights[name] > least and before < iteration - 1:
            self._spikes = [*self._spikes, iteration][-SPIKES:]
            if len(self._spikes) == SPIKES and iteration - self._spikes[0] < SPIKE_STEPS:
                text = (
                    f"{SPIKES} spikes of a loss or of the gradient norm since iteration {self._spikes[0]}, now {name} "
                    f"is {values[name]:.3g}, {heights[name]:.0f} times its noise above its level: training becomes "
                    "unstable. Lower optimizer.lr or optimizer.clip_grad, or set train.on_spike = skip."
                )
        is_over = not self._spikes or iteration - self._spikes[-1] >= SPIKE_STEPS
        return self._switch("spikes", iteration, text, is_over=is_over)

    def _switch(self, name: str, iteration: int, text: str | None, *, is_over: bool) -> list[SignEvent]:
        """Signs of single steps begin at once and end after some steps without such a step."""
        is_active = self._state(name).since is not None
        if (text and not is_active) or (is_over and is_active):
            return [self._change(name, iteration, text)]
        return []


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics whose trend is kept, and those that are made of several."""
    kept = {name: value for name, value in metrics.items() if _is_watched(name)}
    for name, loss in token_losses(metrics).items():
        if name != "lm loss" and "lm loss" in metrics:
            kept[gap_name(name)] = loss - metrics["lm loss"]
    if (norm := metrics.get("grad-norm", 0.0)) > 0:
        kept["log grad-norm"] = math.log(norm)
    if "perf/data_ms" in metrics and "perf/iteration_time_ms" in metrics:
        whole = metrics["perf/data_ms"] + metrics["perf/iteration_time_ms"]
        kept["data share"] = metrics["perf/data_ms"] / whole if whole else 0.0
    return kept


@lru_cache(maxsize=1024)
def _is_watched(name: str) -> bool:
    return UNWATCHED.search(name) is None


def _not_finite(metrics: Mapping[str, float]) -> str | None:
    bad = [f"{name} is {value}" for name, value in token_losses(metrics).items() if not math.isfinite(value)]
    if not bad and metrics.get("nan-iterations"):
        bad = ["the gradient is not finite"]
    return f"{', '.join(bad)}. {REMEDIES}" if bad else None


__all__ = ["REMEDIES", "HealthMonitor", "Sign", "SignEvent", "Window", "built_in_signs"]
