"""The time of a long step without compiling all of it, because its middle repeats.

Each further round of micro-batches adds the same nodes to a compiled schedule, at the same distances from the nodes
that they wait for. Two short schedules that differ by one round show which nodes those are. A step of any length is the
beginning, these nodes as often as needed, and the end. Once two consecutive rounds differ by a constant shift, all
later rounds do, because each node is the later of two earlier ones plus a constant. The rest is one multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.simulate import CompiledSchedule, Node, Work, compile_schedule

FIRST_ROUNDS, LAST_ROUNDS = 3, 8
"""Lengths in which the repeating part is searched, in rounds."""
PERIODS = (1, 2)
"""A round holds this many times pp micro-batches. Two: with an odd pp, blocking sends and messages about shapes the
ranks swap turns after every pp micro-batches."""


def step_time(kind: ScheduleKind, work: Work) -> float:
    """Time of the forward and backward passes of a step: `simulate(kind, work).total_ms`."""
    exchanges_shapes, total = work.shapes_ms is not None, kind.num_microbatches
    for size in (period * kind.pp for period in PERIODS):
        shortest = FIRST_ROUNDS * kind.pp + (total - FIRST_ROUNDS * kind.pp) % size
        if total <= shortest + size:
            break
        parts = repeating_parts(replace(kind, num_microbatches=shortest), size, exchanges_shapes)
        if parts is not None and parts.num_microbatches <= total:
            return parts.total(work.costs(), (total - parts.num_microbatches) // size)
    return compile_schedule(kind, exchanges_shapes).total(work.costs())


@dataclass(frozen=True, slots=True)
class RepeatingSchedule:
    """A schedule of `num_microbatches`, cut at the place where further rounds can be inserted.

    Attributes:
        last: distance of each rank's last node from the end of the list.
        reach: the longest distance to an earlier node in a round or in the end.
    """

    num_microbatches: int
    start: list[Node]
    round: list[Node]
    end: list[Node]
    last: list[int]
    reach: int

    def total(self, costs: list[float], num_rounds: int) -> float:
        """End of the last rank with `num_rounds` further rounds."""
        times, gained = [0.0], 0.0
        _run(self.start, costs, times)
        span = self.reach + len(self.round)
        for idx in range(num_rounds):
            _run(self.round, costs, times)
            round_ms = _steady(times, len(self.round), span)
            if round_ms is not None:
                gained = (num_rounds - idx - 1) * round_ms
                break
        _run(self.end, costs, times)
        return max(times[-distance] for distance in self.last) + gained


def _run(nodes: list[Node], costs: list[float], times: list[float]) -> None:
    append = times.append
    for first, second, cost in nodes:
        one, other = times[-first], times[-second]
        append((one if one > other else other) + costs[cost])


def _steady(times: list[float], length: int, span: int) -> float | None:
    """The time of a round if all nodes that later ones wait for are shifted by it against the round before; or None."""
    if len(times) < span + length:
        return None
    round_ms = times[-1] - times[-1 - length]
    tolerance = 1e-12 * times[-1]
    now, before = times[-span:], times[-span - length : -length]
    for one, other in zip(now, before, strict=True):
        if abs(one - other - round_ms) > tolerance:
            return None
    return round_ms


@lru_cache(maxsize=512)
def repeating_parts(kind: ScheduleKind, size: int, exchanges_shapes: bool) -> RepeatingSchedule | None:
    """Cuts a schedule into start, round of `size` micro-batches and end; None if it repeats at none of the lengths."""
    longer = compile_schedule(kind, exchanges_shapes)
    for _ in range(LAST_ROUNDS - FIRST_ROUNDS):
        shorter, count = longer, kind.num_microbatches
        kind = replace(kind, num_microbatches=count + size)
        longer = compile_schedule(kind, exchanges_shapes)
        if (parts := _cut(shorter, longer, count)) is not None:
            return parts
    return None


def _cut(shorter: CompiledSchedule, longer: CompiledSchedule, num_microbatches: int) -> RepeatingSchedule | None:
    short, long = _relative(shorter), _relative(longer)
    length = len(long) - len(short)
    equal = next((idx for idx, (one, other) in enumerate(zip(short, long, strict=False)) if one != other), len(short))
    if equal < length or short[:equal] + short[equal - length :] != long:
        return None
    last = [len(short) + 1 - node for node in shorter.last]
    if last != [len(long) + 1 - node for node in longer.last]:
        return None
    start, middle, end = short[:equal], short[equal - length : equal], short[equal:]
    if start[-2 * length : -length] != middle:
        return None
    # An end node that waits for a node of the end needs nothing of the rounds; one that waits for an earlier node does.
    reach = max(max(first, second) for first, second, _ in middle + end[:length])
    reach = max([reach, *(max(f, s) - idx for idx, (f, s, _) in enumerate(end))])
    return RepeatingSchedule(num_microbatches, start, middle, end, last, reach)


def _relative(compiled: CompiledSchedule) -> list[Node]:
    """Nodes that name those that they wait for by their distance."""
    return [(idx - first, idx - second, cost) for idx, (first, second, cost) in enumerate(compiled.nodes) if idx]
