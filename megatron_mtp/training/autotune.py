"""Changes the MTP loss factor when health signs ask for it (`train.mtp_autotune`).

The rule. The factor of the schedule is multiplied by a scale, which starts at 1. Signs are those of `observe.signs`.

- If a depth diverges (`mtp rises`) or the main loss is overshadowed, the scale is halved, not below LOWEST.
- If a depth stalls or its gap widens, the scale is multiplied by RAISE, not above HIGHEST.
- If no such sign is active and none began for CALM_STEPS, the scale moves back to 1 by one such step.

After a change, the next one waits for at least WAIT_STEPS, so that its effect can be seen.

Every rank decides for itself. The decisions are equal, because losses and gradient share are sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mtp.observe.health import HealthMonitor
from megatron_mtp.observe.metrics import token_losses
from megatron_mtp.observe.signs import built_in_signs

LOWER, RAISE = 0.5, 1.5
LOWEST, HIGHEST = 0.1, 2.0
WAIT_STEPS, CALM_STEPS = 100, 500
LOWERING, RAISING = ("mtp rises", "main overshadowed"), ("mtp stalls", "gap widens")
"""Signs by what they ask for; lowering goes first."""


@dataclass(slots=True)
class LossFactorTuner:
    """The rule and what it remembers.

    Args:
        num_depths: D.

    Attributes:
        scale: what the factor of the schedule is multiplied by.
        changed: iteration of the last change.
    """

    num_depths: int
    scale: float = 1.0
    changed: int = 0
    _last_sign: int = 0
    _monitor: HealthMonitor = field(init=False)

    def __post_init__(self) -> None:
        signs = built_in_signs(self.num_depths)
        self._monitor = HealthMonitor({name: signs[name] for name in signs if _base(name) in LOWERING + RAISING})

    def step(self, iteration: int, metrics: Mapping[str, float]) -> str | None:
        """Looks at one step. Returns what was changed, for the log, if anything was.

        Args:
            iteration: the step.
            metrics: of the global batch; its losses and `mtp/gradient_share` are read.
        """
        share = "mtp/gradient_share"
        read = token_losses(metrics) | ({share: metrics[share]} if share in metrics else {})
        self._monitor.check(iteration, read)
        active = {_base(name) for name in self._monitor.active}
        if asking := [name for name in LOWERING + RAISING if name in active]:
            self._last_sign = iteration
        if iteration - self.changed < WAIT_STEPS:
            return None
        scale, reason = self.scale, ""
        if asking:
            scale = max(LOWEST, scale * LOWER) if asking[0] in LOWERING else min(HIGHEST, scale * RAISE)
            reason = f"sign '{asking[0]}'"
        elif scale != 1.0 and iteration - self._last_sign >= CALM_STEPS and iteration - self.changed >= CALM_STEPS:
            scale = min(1.0, scale / LOWER) if scale < 1.0 else max(1.0, scale / RAISE)
            reason = f"no sign for {CALM_STEPS} steps"
        if scale == self.scale:
            return None
        text = f"iteration {iteration}: train.mtp_autotune: {reason}: the loss factor of the schedule is multiplied by "
        text += f"{scale:.4g}, before by {self.scale:.4g}."
        self.scale, self.changed = scale, iteration
        return text

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON values; the same on every rank."""
        return {
            "scale": self.scale,
            "changed": self.changed,
            "last_sign": self._last_sign,
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; the start of a run for an empty one."""
        self.scale, self.changed = state.get("scale", 1.0), state.get("changed", 0)
        self._last_sign = state.get("last_sign", 0)
        self._monitor.load_state_dict(state.get("monitor", {}))


def _base(name: str) -> str:
    return name.split(":")[0]
