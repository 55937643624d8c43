"""Signs of trouble that are known for multi-token prediction, each reported once with what to do.

The signs and the advice are those of Megatron-Bridge's guide to MTP ("red flags"), made precise enough to be watched by a program. A sign is a function of the history. To add one, write it and put it into `SIGNS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_STEPS = 20
"""Losses are noisy: signs compare means over this many steps."""
MAX_WINDOWS = 256
"""Older history is thinned to every second window when it grows beyond this."""
RISE_NATS = 0.1
"""An MTP loss has risen if its mean is this far, and SIGMAS standard errors, above an earlier mean."""
WIDENING_NATS = 1.0
"""The gap to the main loss may widen by this much."""
HEALTHY_SHARE = 1 / 3
"""Early in training the main loss falls faster than the others, and every gap widens. It is healthy as long as the MTP loss takes part by
at least this share of the main loss's fall."""
SIGMAS = 4.0
"""Standard errors that a difference of two means must exceed; thousands of comparisons are made in a run."""
REMEDIES = (
    "If it stays so, go back to the last good checkpoint with a lower optimizer.lr, optimizer.clip_grad = 1.0 or less, precision.dtype = "
    "bf16 in place of fp16, or model.mtp_loss_scaling_factor lowered to 0.05."
)


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean of a figure over a window, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Mean of at least two values."""
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)))

    def above(self, other: Mean) -> float:
        """By how much this mean is above the other one beyond doubt; 0 or less if it may be noise."""
        return self.value - other.value - SIGMAS * math.hypot(self.error, other.error)


@dataclass(frozen=True, slots=True)
class Window:
    """Means over some steps: of the main loss, and for each MTP depth of its loss and its gap to the main loss."""

    main: Mean
    mtp: dict[str, Mean]
    gap: dict[str, Mean]


class HealthMonitor:
    """Watches the losses of a run.

    Args:
        window_steps: steps in one window.
    """

    def __init__(self, window_steps: int = WINDOW_STEPS):
        self._window_steps = window_steps
        self._steps: list[dict[str, float]] = []
        self._windows: list[Window] = []
        self._reported: set[str] = set()

    def check(self, iteration: int, losses: dict[str, float]) -> list[str]:
        """Takes in the losses of one step.

        Args:
            iteration: the step.
            losses: nats per token by name; `lm loss` and `mtp_k loss` are watched.

        Returns:
            A message for each sign that shows for the first time.
        """
        watched = {name: value for name, value in losses.items() if name == "lm loss" or name.startswith("mtp_")}
        found = {"not finite": _not_finite(watched)}
        if all(map(math.isfinite, watched.values())) and "lm loss" in watched:
            self._steps.append(watched)
        if len(self._steps) == self._window_steps:
            window = _window(self._steps)
            self._steps.clear()
            found |= {sign: find(self._windows, window) for sign, find in SIGNS.items()}
            self._remember(window)
        new = {sign: text for sign, text in found.items() if text and sign not in self._reported}
        self._reported |= set(new)
        return [f"iteration {iteration}: {text}" for text in new.values()]

    def _remember(self, window: Window) -> None:
        self._windows.append(window)
        if len(self._windows) > MAX_WINDOWS:
            self._windows = self._windows[::2]


def _window(steps: list[dict[str, float]]) -> Window:
    depths = [name for name in steps[-1] if name != "lm loss" and all(name in step for step in steps)]
    return Window(
        main=Mean.of([step["lm loss"] for step in steps]),
        mtp={name: Mean.of([step[name] for step in steps]) for name in depths},
        # Paired in each step: a hard batch raises both losses and leaves the gap alone.
        gap={name: Mean.of([step[name] - step["lm loss"] for step in steps]) for name in depths},
    )


def _not_finite(losses: dict[str, float]) -> str | None:
    bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return None
    return f"{', '.join(bad)}. {REMEDIES}"


def _mtp_rises(history: list[Window], now: Window) -> str | None:
    for name, loss in now.mtp.items():
        for old in history:
            if name not in old.mtp or loss.above(old.mtp[name]) <= RISE_NATS or old.main.above(now.main) <= 0:
                continue
            return (
                f"{name} rose from {old.mtp[name].value:.3f} to {loss.value:.3f} while lm loss fell from {old.main.value:.3f} to "
                f"{now.main.value:.3f}: that depth diverges. Lower model.mtp_loss_scaling_factor (0.05 to 0.1), then optimizer.lr; "
                "keep optimizer.clip_grad at 1.0 or less and prefer precision.dtype = bf16 to fp16."
            )
    return None


def _gap_widens(history: list[Window], now: Window) -> str | None:
    for name, gap in now.gap.items():
        for old in history:
            if name not in old.gap or gap.above(old.gap[name]) <= WIDENING_NATS:
                continue
            if old.mtp[name].value - now.mtp[name].value >= HEALTHY_SHARE * (old.main.value - now.main.value) > 0:
                continue
            return (
                f"the gap of {name} to lm loss widened from {old.gap[name].value:.2f} to {gap.value:.2f} nat: that "
                "depth does not keep up with the trunk. Raise model.mtp_loss_scaling_factor (0.15 to 0.3); if its loss is unsteady, lower "
                "optimizer.lr, keep optimizer.clip_grad at 1.0 or less and prefer precision.dtype = bf16 to fp16."
            )
    return None


SIGNS: dict[str, Callable[[list[Window], Window], str | None]] = {
    "mtp rises": _mtp_rises,
    "gap widens": _gap_widens,
}
