"""Warning signs of a run, each reported once together with a remedy.

A sign is a function `(history, now) -> warning or None` over windows of steps. `SIGNS` holds those of multi-token
prediction: the "red flags" of Megatron-Bridge's guide to MTP with exact thresholds, and its advice.
`signs_after_warmup` makes those of a model that has stopped learning. A sign of your own:

    def grad_norm_grows(history: Sequence[Window], now: Window) -> str | None:
        if history and now.metrics["grad-norm"].above(history[0].metrics["grad-norm"]) > 10:
            return "the gradient norm grew by more than 10. Lower optimizer.lr."
        return None

    HealthMonitor({**SIGNS, "grad norm grows": grad_norm_grows})
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mtp.observe.metrics import token_losses

WINDOW_STEPS = 20
"""Losses are noisy: signs compare means over this many steps."""
MAX_WINDOWS = 256
"""When the history grows beyond this, every second window is dropped."""
RISE_NATS = 0.1
"""An MTP loss has risen if its mean is this far, and SIGMAS standard errors, above an earlier mean."""
WIDENING_NATS = 1.0
"""Largest healthy increase of the gap between an MTP loss and the main loss."""
HEALTHY_SHARE = 1 / 3
"""Early in training the main loss falls faster than the others and every gap widens. That is healthy as long as the MTP
loss falls by at least this share of the main loss's fall."""
SIGMAS = 4.0
"""Standard errors that a difference of two means must exceed; a run makes thousands of comparisons."""
AGREEING, WRONG = 0.98, 0.2
"""Depths that agree with the main prediction at this share of the slots, while it is right at no more than that share,
predict one token nearly everywhere."""
REMEDIES = (
    "If it stays so, go back to the last good checkpoint with a lower optimizer.lr, optimizer.clip_grad = 1.0 or less, "
    "precision.dtype = bf16 instead of fp16, or model.mtp_loss_scaling_factor lowered to 0.05."
)


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean of a metric over a window, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean of at least two finite values."""
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)))

    def above(self, other: Mean) -> float:
        """By how much this mean is significantly above the other one; 0 or less if the difference may be noise."""
        return self.value - other.value - SIGMAS * math.hypot(self.error, other.error)


@dataclass(frozen=True, slots=True)
class Window:
    """Means over some steps.

    Args:
        main: main loss.
        mtp: `mtp_k loss` -> that loss.
        gap: `mtp_k loss` -> that loss minus the main loss.
        metrics: every metric that the records hold in all steps of the window, by its name there.
    """

    main: Mean
    mtp: dict[str, Mean]
    gap: dict[str, Mean]
    metrics: dict[str, Mean] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: dict[str, Mean], gap: dict[str, Mean]) -> Window:
        """A window from all its means; `lm loss` is one of them."""
        mtp = {name: metrics[name] for name in token_losses(metrics) if name != "lm loss"}
        return cls(main=metrics["lm loss"], mtp=mtp, gap=gap, metrics=metrics)


Sign = Callable[[Sequence[Window], Window], str | None]
"""(earlier windows, the current one) -> a warning with its remedy, or None."""


def mtp_rises(history: Sequence[Window], now: Window) -> str | None:
    """An MTP loss rises while the main loss falls."""
    for name, loss in now.mtp.items():
        for old in history:
            if name not in old.mtp or loss.above(old.mtp[name]) <= RISE_NATS or old.main.above(now.main) <= 0:
                continue
            return (
                f"{name} rose from {old.mtp[name].value:.3f} to {loss.value:.3f} while lm loss fell from "
                f"{old.main.value:.3f} to {now.main.value:.3f}: that depth diverges. Lower "
                "model.mtp_loss_scaling_factor (0.05 to 0.1), then optimizer.lr; keep optimizer.clip_grad at 1.0 or "
                "less and prefer precision.dtype = bf16 to fp16."
            )
    return None


def gap_widens(history: Sequence[Window], now: Window) -> str | None:
    """An MTP loss falls behind the main loss."""
    for name, gap in now.gap.items():
        for old in history:
            if name not in old.gap or gap.above(old.gap[name]) <= WIDENING_NATS:
                continue
            if old.mtp[name].value - now.mtp[name].value >= HEALTHY_SHARE * (old.main.value - now.main.value) > 0:
                continue
            return (
                f"the gap of {name} to lm loss widened from {old.gap[name].value:.2f} to {gap.value:.2f} nat: that "
                "depth does not keep up with the trunk. Raise model.mtp_loss_scaling_factor (0.15 to 0.3); if its "
                "loss is unstable, lower optimizer.lr, keep optimizer.clip_grad at 1.0 or less and prefer "
                "precision.dtype = bf16 to fp16."
            )
    return None


SIGNS: dict[str, Sign] = {"mtp rises": mtp_rises, "gap widens": gap_widens}


def signs_after_warmup(vocab_size: int, warmup_samples: float) -> dict[str, Sign]:
    """Signs that the model has stopped learning: both look at two windows in a row between which the main loss does not
    fall.

    Args:
        vocab_size: ids that the model predicts.
        warmup_samples: of the learning rate. Before its end they are silent.
    """

    def after_warmup(sign: Callable[[Window], str | None]) -> Sign:
        def stays(history: Sequence[Window], now: Window) -> str | None:
            seen = now.metrics.get("consumed-samples")
            if not history or seen is None or seen.value <= warmup_samples or history[-1].main.above(now.main) > 0:
                return None
            return sign(now) if sign(history[-1]) else None

        return stays

    chance = math.log(vocab_size)

    def worse_than_chance(window: Window) -> str | None:
        loss = window.main
        if loss.value - SIGMAS * loss.error <= chance:
            return None
        return (
            f"lm loss stays at {loss.value:.2f}, above ln {vocab_size} = {chance:.2f}, the loss of predicting every "
            "token alike: the model learns nothing. Start again with a lower optimizer.lr, a longer warmup or "
            "optimizer.clip_grad = 1.0; weights that diverged so far rarely recover."
        )

    def one_token(window: Window) -> str | None:
        return empty_agreement({name: mean.value for name, mean in window.metrics.items()})

    return {"worse than chance": after_warmup(worse_than_chance), "one token": after_warmup(one_token)}


def empty_agreement(rates: Mapping[str, float]) -> str | None:
    """A remark where acceptance means nothing: all depths predict one token nearly everywhere.

    Args:
        rates: acceptance rates by name, among any other metrics.
    """
    right = rates.get("lm/top1_target", 1.0)
    agreeing = [rate for name, rate in rates.items() if re.fullmatch(r"mtp_\d+/top1_main", name)]
    if not agreeing or min(agreeing) < AGREEING or right > WRONG:
        return None
    return (
        f"the MTP predictions agree with the main one at {min(agreeing):.1%} of the slots, and that one is right at "
        f"{right:.1%}: the model predicts one token nearly everywhere. Acceptance (mtp_k/accepted, "
        "mtp/accepted_length) means nothing here; look at top1_target."
    )


class HealthMonitor:
    """Watches the metrics of a run.

    Args:
        signs: name -> sign. A sign is called at the end of each window.
        window_steps: steps in one window.
    """

    def __init__(self, signs: Mapping[str, Sign] = SIGNS, window_steps: int = WINDOW_STEPS):
        self._signs, self._window_steps = signs, window_steps
        self._steps: list[dict[str, float]] = []
        self._windows: list[Window] = []
        self._reported: set[str] = set()

    def check(self, iteration: int, metrics: Mapping[str, float]) -> list[str]:
        """Adds the metrics of one step.

        Args:
            iteration: the step.
            metrics: value by name; `lm loss` and `mtp_k loss`, in nats per token, must be finite.

        Returns:
            One message for each sign that appears for the first time.
        """
        losses = token_losses(metrics)
        found = {"not finite": _not_finite(losses)}
        if not found["not finite"] and "lm loss" in losses:
            self._steps.append(dict(metrics))
        if len(self._steps) == self._window_steps:
            window = _window(self._steps)
            self._steps.clear()
            found |= {name: sign(self._windows, window) for name, sign in self._signs.items()}
            self._windows.append(window)
            if len(self._windows) > MAX_WINDOWS:
                self._windows = self._windows[::2]
        new = {name: text for name, text in found.items() if text and name not in self._reported}
        self._reported |= set(new)
        return [f"iteration {iteration}: {text}" for text in new.values()]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on as if it had not stopped, as JSON values."""
        windows = [{"metrics": _as_lists(window.metrics), "gap": _as_lists(window.gap)} for window in self._windows]
        return {"steps": list(self._steps), "windows": windows, "reported": sorted(self._reported)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; nothing of it for an empty one."""
        self._steps = [dict(step) for step in state.get("steps", [])]
        self._windows = [Window.of(_as_means(w["metrics"]), _as_means(w["gap"])) for w in state.get("windows", [])]
        self._reported = set(state.get("reported", []))


def _as_lists(means: Mapping[str, Mean]) -> dict[str, list[float]]:
    return {name: [mean.value, mean.error] for name, mean in means.items()}


def _as_means(lists: Mapping[str, list[float]]) -> dict[str, Mean]:
    return {name: Mean(value, error) for name, (value, error) in lists.items()}


def _window(steps: list[dict[str, float]]) -> Window:
    names = [name for name in steps[-1] if all(name in step and math.isfinite(step[name]) for step in steps)]
    metrics = {name: Mean.of([step[name] for step in steps]) for name in names}
    mtp = [name for name in token_losses(metrics) if name != "lm loss"]
    # The difference is taken in each step: a hard batch raises both losses and leaves the gap alone.
    gap = {name: Mean.of([step[name] - step["lm loss"] for step in steps]) for name in mtp}
    return Window.of(metrics, gap)


def _not_finite(losses: Mapping[str, float]) -> str | None:
    bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    return f"{', '.join(bad)}. {REMEDIES}" if bad else None
