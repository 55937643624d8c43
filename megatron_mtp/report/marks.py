"""What happened to a run beside its steps: signs, faults, restarts, rollbacks, changes of its schedule."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mtp.observe.run_log import Interruption, RunLog

KINDS = {
    "fault": "fault",
    "warning": "sign",
    "recovery": "recovery",
    "autotune": "autotune",
    "rollback": "rollback",
    "start": "restart",
    "phase": "phase",
}
"""Kind of a record -> what the report calls it."""
SIGNS_AND_FAULTS = ("warning", "recovery", "fault", "autotune")
"""Kinds of lines that say how the run is, and what was done about it."""
MOST = 100
"""Marks of one kind that are drawn; the tables have all."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step.

    Args:
        kind: a value of KINDS.
        iteration: steps done then.
        text: what happened.
    """

    kind: str
    iteration: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def marks(log: RunLog) -> list[Mark]:
    """Everything that is marked in the curves of a run, in order."""
    found = [
        Mark(KINDS[line["kind"]], line["iteration"], without_iteration(line.get("text", "")))
        for line in log.texts
        if line["kind"] in SIGNS_AND_FAULTS
    ]
    found += [Mark(KINDS[one.line["kind"]], one.line["iteration"], interruption_text(one)) for one in log.interruptions]
    found += [Mark("phase", change["step"], change["what"]) for change in phases(log)]
    return sorted(found, key=lambda mark: mark.iteration)


def shown_marks(found: list[Mark]) -> list[Mark]:
    """At most MOST of each kind: a run with a fault at each step must not hide its curves."""
    counts: dict[str, int] = {}
    kept = []
    for mark in found:
        counts[mark.kind] = counts.get(mark.kind, 0) + 1
        if counts[mark.kind] <= MOST:
            kept.append(mark)
    return kept


def phases(log: RunLog) -> list[dict[str, Any]]:
    """Changes of the schedule that the run plans, as {"step", "what"}; those after the last record are left out."""
    last = log.last().get("iteration", 0)
    return [change for change in log.start.get("extra", {}).get("milestones", []) if 0 < change["step"] <= last]


def interruption_text(one: Interruption) -> str:
    """What a restart or a rollback did, in one sentence."""
    line = one.line
    again = f", {one.lost:,} steps again" if one.lost else ""
    if line["kind"] == "rollback":
        return f"back to iteration {line['iteration']:,}{again}"
    size = f" on {line['world_size']} x {line['device']}" if "world_size" in line and "device" in line else ""
    return f"started again from iteration {line['iteration']:,}{again}{size}"


def without_iteration(text: str) -> str:
    """A message without the step that stands at its beginning."""
    return re.sub(r"^iteration [\d,]+: ", "", text)
