"""How sure a profile is: whether the machine was quiet while it was measured.

Medians of part times hide single interruptions, but no statistics of one profile see that everything was slower because
other programs shared the cores. So spread and drift of the micro-batches are judged, and on a CPU what others computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

MOST_SPREAD, MOST_DRIFT, MOST_CROWDING = 0.15, 0.05, 0.1
"""Above one of them a machine was not quiet: shares of the time of a micro-batch, and cores."""
LEAST_SAMPLES = 8
"""With fewer micro-batches nothing can be said."""
STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What the micro-batches of a profile say about it.

    Attributes:
        samples: timed micro-batches.
        spread: half of them lie within this share of the median.
        drift: median of the second half over that of the first, less 1.
        crowding: cores that others used and that the processes would have needed; None: unknown, or on GPUs.
    """

    samples: int
    spread: float
    drift: float
    crowding: float | None = None

    @classmethod
    def of(cls, times: Sequence[float], crowding: float | None = None) -> Noise:
        """The noise of the times of micro-batches, in their order."""
        if len(times) < 2:
            return cls(samples=len(times), spread=math.inf, drift=math.inf, crowding=crowding)
        low, _, high = quantiles(times, n=4, method="inclusive")
        half = len(times) // 2
        drift = median(times[half:]) / median(times[:half]) - 1
        return cls(samples=len(times), spread=(high - low) / median(times), drift=drift, crowding=crowding)

    @property
    def uncertainty(self) -> float:
        """Share by which a step may differ from its plan for this reason: error of the median, drift, or crowding.

        The standard error of the median of n normal times is 1.25 deviations / sqrt(n), and half of them lie within
        1.35 deviations; twice that error is meant.
        """
        error = 2 * 1.25 * self.spread / 1.35 / math.sqrt(max(1, self.samples))
        return max(error, abs(self.drift), self.crowding or 0.0)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing speaks against the profile."""
        is_steady = self.spread <= MOST_SPREAD and abs(self.drift) <= MOST_DRIFT
        return is_steady and self.samples >= LEAST_SAMPLES and (self.crowding or 0.0) <= MOST_CROWDING

    def as_notes(self) -> dict[str, Any]:
        """For the notes of a profile; infinite numbers, which JSON has not, are left out."""
        found = asdict(self) | {"uncertainty": self.uncertainty, "is_quiet": self.is_quiet}
        return {name: value for name, value in found.items() if value is None or math.isfinite(value)}

    def words(self) -> str:
        """A sentence for the person who measures."""
        if self.samples < LEAST_SAMPLES:
            return f"{self.samples} micro-batches are too few to tell how sure these times are; use more --steps"
        if self.is_quiet:
            return f"the machine was quiet: times are sure to about {self.uncertainty:.0%}"
        reasons = []
        if self.spread > MOST_SPREAD:
            reasons.append(f"half of the micro-batches differ by more than {self.spread:.0%}")
        if abs(self.drift) > MOST_DRIFT:
            reasons.append(f"the second half took {self.drift:+.0%}")
        if self.crowding and self.crowding > MOST_CROWDING:
            reasons.append(f"other programs took {self.crowding:.1f} of the cores that were needed")
        text = "; ".join(reasons)
        return f"cannot tell: the machine was not quiet ({text}). Measure again when nothing else runs"


def noise_of_notes(notes: Mapping[str, Any]) -> str:
    """What a plan says about a profile that was measured on a busy machine; "" if nothing speaks against it."""
    found = notes.get("noise")
    if not isinstance(found, Mapping) or found.get("is_quiet", True) is not False:
        return ""
    share = found.get("uncertainty")
    size = f", times may be {share:.0%} off" if isinstance(share, float) else ""
    return f" (not on a quiet machine{size})"


class Load:
    """What other programs computed between its making and a call of `crowding`."""

    def __init__(self) -> None:
        self._busy = busy_seconds()

    def crowding(self, own_s: float, wall_s: float, own_cores: float) -> float | None:
        """Cores that others used although they were needed; None where the system does not say.

        Args:
            own_s: processor time of the measured processes.
            own_cores: that they use when nothing disturbs them.
        """
        now = busy_seconds()
        if now is None or self._busy is None or wall_s <= 0:
            return None
        others = max(0.0, now - self._busy - own_s) / wall_s
        return max(0.0, min(others, own_cores + others - (os.cpu_count() or 1)))


def busy_seconds() -> float | None:
    """Processor time of all programs since the machine started; None where /proc/stat is missing."""
    try:
        fields = [int(text) for text in STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
