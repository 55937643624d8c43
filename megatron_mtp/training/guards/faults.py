"""Bad steps: losses and gradients that are not finite, and spikes. Detects them and decides what to do about them.

Losses and gradient norm are global values, the same on every rank, so every rank decides the same without a message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_mtp.config.sections import TrainConfig
from megatron_mtp.errors import NumericsError
from megatron_mtp.observe.health import REMEDIES
from megatron_mtp.training.state import TrainState

GRADIENT = "grad norm"
Action = Literal["continue", "roll back"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a step.

    Attributes:
        kind: nan for anything that is not finite.
        signs: one phrase for each bad value, such as `mtp_1 loss is nan`.
    """

    kind: Literal["nan", "spike"]
    signs: list[str]


class FaultWatch:
    """Checks the losses and the gradient norm of each step before its update is applied.

    A spike is more than `spike_sigmas` standard deviations above the mean of the last `spike_window` good steps, as in
    OLMo-core's SkipStepOptimizer. The history is kept in the train state, so that a resumed run decides as the
    uninterrupted run would have.
    """

    def __init__(self, options: TrainConfig, state: TrainState):
        self._options, self._state = options, state

    def of_losses(self, losses: dict[str, float]) -> Fault | None:
        """Checks the losses of the depths that have valid targets: name -> nats per token."""
        bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        return Fault("nan", bad) if bad else self._spike(losses)

    def of_gradient(self, norm: float | None) -> Fault | None:
        """Checks the norm of the complete gradient before clipping; None: it is not known."""
        if norm is None:
            return None
        if not math.isfinite(norm):
            return Fault("nan", [f"{GRADIENT} is {norm}"])
        return self._spike({GRADIENT: norm})

    def lets_pass(self, fault: Fault | None) -> bool:
        """Whether the update is applied despite the fault."""
        return fault is None or (fault.kind == "spike" and self._options.on_spike == "report")

    def remember(self, losses: dict[str, float], norm: float | None) -> None:
        """Adds a step whose update was applied to the history."""
        values = losses if norm is None else {**losses, GRADIENT: norm}
        history = self._state.health.setdefault("spikes", {})
        for name, value in values.items():
            if math.isfinite(value):
                history[name] = [*history.get(name, []), value][-self._options.spike_window :]

    def _spike(self, values: dict[str, float]) -> Fault | None:
        history, signs = self._state.health.get("spikes", {}), []
        for name, value in values.items():
            past = history.get(name, [])
            if len(past) < self._options.spike_window // 2:
                continue
            mean = math.fsum(past) / len(past)
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in past) / (len(past) - 1))
            if value > mean + self._options.spike_sigmas * spread:
                sigmas = (value - mean) / (spread or math.ulp(mean))
                signs.append(f"{name} is {value:.4g}, {sigmas:.3g} sigmas above {mean:.4g}")
        return Fault("spike", signs) if signs else None


def policy_of(fault: Fault, options: TrainConfig) -> str:
    """report, skip, stop or rollback."""
    return options.on_nan if fault.kind == "nan" else options.on_spike


def decide(fault: Fault, options: TrainConfig, state: TrainState, place: str) -> tuple[Action, str]:
    """Decides what to do about a fault, and writes the report. Counts skips; the rollback itself counts rollbacks.

    Args:
        place: origin of the fault, for the report.

    Raises:
        NumericsError: the policy is to stop, or its limit is reached.
    """
    policy = policy_of(fault, options)
    found = f"iteration {state.iteration + 1}: {', '.join(fault.signs)} ({place})."
    field = f"train.on_{fault.kind} = {policy}"
    if policy == "report":
        return "continue", f"{found} {field}: the update is applied."
    if policy == "stop":
        raise NumericsError(f"{found} {field}: the run stops before the update. {REMEDIES}")
    if policy == "skip":
        state.skips_in_row += 1
        if state.skips_in_row > options.skip_limit:
            limit = f"{options.skip_limit} updates in a row were skipped (train.skip_limit)"
            raise NumericsError(f"{found} {field}: {limit}, so the run stops. {REMEDIES}")
        row = f"{state.skips_in_row} in a row of at most {options.skip_limit}"
        return "continue", f"{found} {field}: the update is skipped, {row}. {REMEDIES}"
    if state.rollbacks >= options.rollback_limit:
        limit = f"{state.rollbacks} rollbacks were done (train.rollback_limit)"
        raise NumericsError(f"{found} {field}: {limit}, so the run stops. {REMEDIES}")
    count = f"rollback {state.rollbacks + 1} of at most {options.rollback_limit}"
    return "roll back", f"{found} {field}: {count}. {REMEDIES}"
