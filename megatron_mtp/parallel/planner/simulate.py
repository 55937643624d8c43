"""Simulates a pipeline schedule event by event with given times. Pure arithmetic.

A message starts when both ends have posted it (rendezvous, as in gloo and NCCL), takes its time on a link of its own,
and then ends for both. Which event waits for which does not depend on the times. So a schedule is compiled once into a
list of nodes, each the later of two earlier ones plus a cost, and one pass over the list times a split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_mtp.parallel.planner.part_costs import PartTime
from megatron_mtp.parallel.planner.schedule import Compute, Message, ScheduleKind, Wait, rank_program

NO_COST = 0
Node = tuple[int, int, int]
"""The two earlier nodes that this one waits for, and the class of its cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step costs.

    Args:
        chunks: `chunks[pp_rank][vp_rank]`, the times of one micro-batch.
        message_ms: for each boundary between chunks in execution order, pp * vp - 1 of them, the time of a message.
        shapes_ms: time of the message about shapes that precedes each message if the MTP layers stand alone; None:
            there is none.
    """

    chunks: tuple[tuple[PartTime, ...], ...]
    message_ms: tuple[float, ...]
    shapes_ms: float | None = None

    @property
    def pp(self) -> int:
        """Pipeline size."""
        return len(self.chunks)

    @property
    def vp(self) -> int:
        """Chunks of each rank."""
        return len(self.chunks[0])

    def costs(self) -> list[float]:
        """The cost of every class of nodes, in the order in which `_Compiler` numbers them."""
        pp, vp = self.pp, self.vp
        costs = [0.0, self.shapes_ms or 0.0]
        for chunk in range(pp * vp):
            time = self.chunks[chunk % pp][chunk // pp]
            costs += [time.forward_ms, time.backward_ms]
        return [*costs, *self.message_ms]


@dataclass(frozen=True, slots=True)
class Event:
    """One call of a chunk."""

    pp_rank: int
    vp_rank: int
    micro_batch: int
    is_forward: bool
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Forward and backward passes of a step."""

    total_ms: float
    events: tuple[Event, ...]


def simulate(kind: ScheduleKind, work: Work) -> Timeline:
    """Every call with its start and end."""
    compiled = compile_schedule(kind, work.shapes_ms is not None)
    costs = work.costs()
    times = compiled.times(costs)
    events = []
    for rank, call, node in compiled.calls:
        start_ms = times[node] - costs[compiled.nodes[node][2]]
        events.append(Event(rank, call.vp_rank, call.micro_batch, call.is_forward, start_ms, times[node]))
    return Timeline(max(times[node] for node in compiled.last), tuple(events))


@dataclass(frozen=True, slots=True)
class CompiledSchedule:
    """Nodes, each after those that it waits for; node 0 is the start of the step.

    Args:
        calls: (rank, call, node), in the order of nodes.
        last: the last node of each rank.
    """

    nodes: list[Node]
    calls: list[tuple[int, Compute, int]]
    last: list[int]

    def times(self, costs: list[float]) -> list[float]:
        """End of each node."""
        times = [0.0]
        append = times.append
        for first, second, cost in self.nodes[1:]:
            one, other = times[first], times[second]
            append((one if one > other else other) + costs[cost])
        return times

    def total(self, costs: list[float]) -> float:
        """End of the last rank."""
        times = self.times(costs)
        return max(times[node] for node in self.last)


@lru_cache(maxsize=64)
def compile_schedule(kind: ScheduleKind, exchanges_shapes: bool) -> CompiledSchedule:
    """Works out which event waits for which.

    Raises:
        RuntimeError: the schedule deadlocks.
    """
    return _Compiler(kind, exchanges_shapes).run()


class _Compiler:
    """Executes the programs of all ranks in turn, each as far as it can go, and records what waits for what."""

    def __init__(self, kind: ScheduleKind, exchanges_shapes: bool):
        self.kind, self.exchanges_shapes = kind, exchanges_shapes
        self.nodes: list[Node] = [(0, 0, NO_COST)]
        self.calls: list[tuple[int, Compute, int]] = []
        self.clock = [0] * kind.pp  # the node after which each rank continues
        # The node that posted a message first, and the node at which it ends; messages about shapes separately.
        self.posted: dict[Message, int] = {}
        self.done: dict[Message, int] = {}
        self.posted_shapes: dict[Message, int] = {}
        self.done_shapes: dict[Message, int] = {}

    def run(self) -> CompiledSchedule:
        runners = deque((rank, self._run_rank(rank)) for rank in range(self.kind.pp))
        stuck = 0
        while runners:
            rank, runner = runners.popleft()
            has_moved = next(runner, None)
            if has_moved is None:  # this rank is done
                stuck = 0
                continue
            runners.append((rank, runner))
            stuck = 0 if has_moved else stuck + 1
            if stuck > 2 * len(runners):
                raise RuntimeError(f"the schedule deadlocks: ranks {[rank for rank, _ in runners]} wait for each other")
        return CompiledSchedule(self.nodes, self.calls, self.clock)

    def _run_rank(self, rank: int) -> Iterator[bool]:
        """Yields whether this rank has moved, after each call and whenever it must wait for another.

        The ranks take turns call by call, so that the order of nodes repeats from round to round (see steady.py).
        """
        clock, first_cost = self.clock, 2 + 2 * self.kind.pp * self.kind.vp
        for step in rank_program(self.kind, rank):
            if isinstance(step, Compute):
                chunk = step.vp_rank * self.kind.pp + rank
                clock[rank] = self._node(clock[rank], clock[rank], 2 + 2 * chunk + (not step.is_forward))
                self.calls.append((rank, step, clock[rank]))
                yield True
                continue
            if isinstance(step, Wait):
                yield from self._await(rank, (step.message,), self.done)
                continue
            messages = step.sends + step.receives
            if self.exchanges_shapes:
                for message in messages:
                    self._post(message, clock[rank], 1, self.posted_shapes, self.done_shapes)
                yield from self._await(rank, messages, self.done_shapes)
            for message in messages:
                self._post(message, clock[rank], first_cost + message[1], self.posted, self.done)
            if step.is_blocking:
                yield from self._await(rank, messages, self.done)

    def _await(self, rank: int, messages: tuple[Message, ...], done: dict[Message, int]) -> Iterator[bool]:
        for message in messages:
            while message not in done:
                yield False
        for message in messages:
            self.clock[rank] = self._later(self.clock[rank], done[message])

    def _post(
        self, message: Message, node: int, cost: int, posted: dict[Message, int], done: dict[Message, int]
    ) -> None:
        other = posted.pop(message, None)
        if other is None:
            posted[message] = node
        else:
            done[message] = self._node(other, node, cost)

    def _later(self, node: int, other: int) -> int:
        """The later of two nodes; a message that was posted at this node ends later anyway."""
        first, second, _ = self.nodes[other]
        if node in (first, second):
            return other
        return self._node(node, other, NO_COST)

    def _node(self, first: int, second: int, cost: int) -> int:
        self.nodes.append((first, second, cost))
        return len(self.nodes) - 1
