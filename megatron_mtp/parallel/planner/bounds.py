"""Lower bounds on the time of a step, which prove how much faster another split could be.

A bound is the length of a path through the schedule: a chain of calls and messages of which each begins only after the
one before has ended. No step is shorter than any of its paths. docs/planning.md explains each of them.

The names: rank p of pp; M micro-batches; a message is waited for where it is posted if its exchange is blocking. Times
are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from math import inf

from megatron_mtp.parallel.planner.part_costs import ZERO
from megatron_mtp.parallel.planner.schedule import Compute, Exchange, ScheduleKind, rank_program
from megatron_mtp.parallel.planner.split import Split, SplitProblem

MAX_CHEAPER_LAYERS = 6
"""If more layers are cheaper than the most expensive one, `lowest_by_loads` counts every layer as the cheapest."""

StageFits = Callable[[int, int, int, bool], bool]
"""Whether a stage (rank, first layer, last layer + 1, is_standalone) fits the memory, without interleaving."""


class RankBounds:
    """Three bounds for each rank, for the splits with the MTP layers in one place.

    Args:
        is_standalone: see Split.
    """

    def __init__(self, problem: SplitProblem, is_standalone: bool):
        self.problem, self.is_standalone, kind = problem, is_standalone, problem.kind
        self._count: int = kind.num_microbatches
        message_ms = problem.message_ms + (problem.shapes_ms if is_standalone else 0.0)
        # Messages that each of a rank's three paths waits for, without the round trip that two of them hold.
        self._messages_ms = []
        for rank in range(kind.pp):
            between, after, before = blocking_exchanges(kind, rank)
            self._messages_ms.append([n * message_ms for n in (2 * rank + between, after, before)])
        # Forward calls that are left to a rank when the first micro-batch's gradient has come back to it.
        self._left = [max(0, self._count - kind.num_warmup(rank) - 1) for rank in range(kind.pp)]
        extras = problem.extras[is_standalone]
        norm = problem.final_norm if problem.num_depths else ZERO
        parts = (*problem.layers, *extras, norm)
        passes_ms = sum(part.forward_ms for part in parts) + sum(part.backward_ms for part in parts)
        self._round_trip_ms = passes_ms + 2 * (kind.pp - 1) * message_ms
        self._upstream_ms = [0.0, *accumulate(extra.total_ms for extra in extras[: kind.pp])]
        self._layers_ms = [one + other for one, other in zip(*problem.layer_sums, strict=True)]
        self.fewest_ms = min((layer.total_ms for layer in problem.layers), default=0.0)

    def work(self, rank: int, load_ms: float, upstream_ms: float) -> float:
        """All calls of a rank, after its first input has come and before its last gradient has gone.

        The first micro-batch passes the first chunks of the ranks before p forward, M micro-batches pass the chunks of
        p, and the last gradient passes those first chunks backward. Each of the p boundaries is crossed twice, and
        rank p waits for its blocking exchanges.

        Args:
            load_ms: one micro-batch in all chunks of the rank, forward and backward.
            upstream_ms: one micro-batch in the first chunks of the ranks before it, forward and backward.
        """
        return upstream_ms + self._count * load_ms + self._messages_ms[rank][0]

    def first_micro_batch(self, rank: int, forward_ms: float, backward_ms: float) -> float:
        """Without interleaving: the first micro-batch's round trip to p, then what is left for p to do.

        The first micro-batch goes forward through all stages and backward to p. Rank p still has M - 1 backward calls,
        and all forward calls but its warm-up and one. The last gradient then passes the ranks before p. So every stage
        is passed once in each direction.
        """
        left_ms = (self._count - 1) * backward_ms + self._left[rank] * forward_ms
        return self._round_trip_ms + left_ms + self._messages_ms[rank][1]

    def last_micro_batch(self, rank: int, forward_ms: float, backward_ms: float) -> float:
        """Without interleaving: what p does up to its last forward call, then that micro-batch's round trip.

        The mirror image of `first_micro_batch`: M - 1 forward calls of p, and all backward calls but those after its
        last forward call, come before the last micro-batch goes on to the last stage and back to the first.
        """
        before_ms = (self._count - 1) * forward_ms + self._left[rank] * backward_ms
        return self._round_trip_ms + before_ms + self._messages_ms[rank][2]

    def stage(self, rank: int, start: int, stop: int) -> float:
        """The highest bound of a rank that holds the layers start..stop-1; without interleaving."""
        forward_ms, backward_ms = self.problem.chunk_time(rank, start, stop, self.is_standalone)
        return max(
            self.work(rank, forward_ms + backward_ms, self._upstream_ms[rank] + self._layers_ms[start]),
            self.first_micro_batch(rank, forward_ms, backward_ms),
            self.last_micro_batch(rank, forward_ms, backward_ms),
        )

    def split(self, split: Split) -> float:
        """The highest bound of all ranks for one split."""
        pp = self.problem.kind.pp
        if self.problem.kind.vp == 1:
            return max(self.stage(rank, *span) for rank, span in enumerate(split.spans))
        times = self.problem.chunk_totals(split)
        upstream = [0.0, *accumulate(times[:pp])]
        return max(self.work(rank, sum(times[rank::pp]), upstream[rank]) for rank in range(pp))

    def extra_ms(self, rank: int) -> float:
        """What a rank's chunks hold in addition to layers, forward and backward."""
        return sum(extra.total_ms for extra in self.problem.extras[self.is_standalone][rank :: self.problem.kind.pp])


def lowest_by_stages(bounds: RankBounds, fits: StageFits | None = None) -> list[list[float]]:
    """Without interleaving: the lowest value of the last ranks' highest bound, over all ways to deal out layers.

    Dynamic program from the last rank to the first: ranks p.. with n layers before them choose where p ends, and the
    worst of p's bound and of the rest counts. `[0][0]` is below every split.

    Returns:
        `[p][n]`, infinite where no legal choice fits.
    """
    problem, alone = bounds.problem, bounds.is_standalone
    pp, num_layers, fewest = problem.kind.pp, len(problem.layers), problem.fewest_layers[alone]
    table = [[inf] * (num_layers + 1) for _ in range(pp)] + [[inf] * num_layers + [0.0]]
    for rank in reversed(range(pp)):
        last_stop = num_layers - sum(fewest[rank + 1 :])  # later ranks need the rest
        for start in range(sum(fewest[:rank]), last_stop - fewest[rank] + 1) if rank else (0,):
            best = inf
            for stop in range(start + fewest[rank], min(start + problem.most(rank, alone), last_stop) + 1):
                if table[rank + 1][stop] >= best:
                    continue
                if fits is not None and not fits(rank, start, stop, alone):
                    break  # more layers never need less memory
                here = bounds.stage(rank, start, stop)
                best = min(best, max(here, table[rank + 1][stop]))
                if here >= best and rank < pp - 1 and stop > start + fewest[rank]:
                    break  # more layers only make this rank slower
            table[rank][start] = best
    return table


def lowest_by_loads(bounds: RankBounds) -> float:
    """With interleaving: a time that the `work` bound of some rank reaches in every split.

    Two claims, and the better one counts. The mean over ranks of what they compute is the same for every split, and
    some rank has at least the mean. And for a limit under which `_can_hold` finds no room for all layers, every split
    has a rank above the limit; bisection finds such a limit.
    """
    problem, kind = bounds.problem, bounds.problem.kind
    costs = sorted(layer.total_ms for layer in problem.layers)
    cheaper, expensive_ms = [cost for cost in costs if cost < costs[-1] * (1 - 1e-9)], costs[-1]
    if len(cheaper) > MAX_CHEAPER_LAYERS:
        cheaper, expensive_ms = [], costs[0]
    in_total = sum(bounds.extra_ms(rank) for rank in range(kind.pp)) + sum(costs)
    low = kind.num_microbatches * in_total / kind.pp
    ends_ms = bounds.extra_ms(0) + bounds.extra_ms(kind.pp - 1)
    high = 4 * low + bounds.work(kind.pp - 1, sum(costs) + ends_ms, 0.0)
    if _can_hold(bounds, low, cheaper, expensive_ms):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _can_hold(bounds, middle, cheaper, expensive_ms) else (middle, high)
    return low


def _can_hold(bounds: RankBounds, limit_ms: float, cheaper: list[float], expensive_ms: float) -> bool:
    """Whether ranks whose `work` bounds stay within a limit have room for all layers.

    A relaxation, so that "no" holds for every split: a rank's chunks need not be neighbours, every cheaper layer counts
    as the cheapest, and the ranks before p hold as few layers as they may, of the cheapest kind.

    Args:
        cheaper: times of the layers that are cheaper than `expensive_ms`, ascending.
    """
    problem, alone, kind = bounds.problem, bounds.is_standalone, bounds.problem.kind
    cheap_ms = cheaper[0] if cheaper else expensive_ms
    fewest, extras = problem.fewest_layers[alone], problem.extras[alone]
    # most[n]: the most expensive layers that the ranks so far hold if they hold n cheaper ones; -1: not possible.
    most = [0] + [-1] * len(cheaper)
    upstream_ms = 0.0
    for rank in range(kind.pp):
        room_ms = (limit_ms - bounds.work(rank, bounds.extra_ms(rank), upstream_ms)) / kind.num_microbatches
        num_fewest = sum(fewest[rank :: kind.pp])
        after = [-1] * len(most)
        for before, held in enumerate(most):
            if held < 0:
                continue
            for taken in range(len(most) - before):
                left_ms = room_ms - taken * cheap_ms
                added = int(left_ms / expensive_ms + 1e-9)
                if left_ms >= -1e-9 and taken + added >= num_fewest:
                    after[before + taken] = max(after[before + taken], held + added)
        most = after
        upstream_ms += extras[rank].total_ms + fewest[rank] * cheap_ms
    return most[-1] >= len(problem.layers) - len(cheaper)


def splits_below(bounds: RankBounds, limit_ms: float) -> list[tuple[float, Split]]:
    """All splits whose bound is below a limit, with their bounds.

    Chunks are filled in execution order. A beginning is given up as soon as its bound reaches the limit, the chunks
    that are still open counted with the fewest layers, all of the cheapest.
    """
    problem, alone = bounds.problem, bounds.is_standalone
    num_layers, pp, is_interleaved = len(problem.layers), problem.kind.pp, problem.kind.vp > 1
    last, fewest, extras = problem.num_chunks - 1, problem.fewest_layers[alone], problem.extras[alone]
    needed_after = [*accumulate(reversed(fewest), initial=0)][::-1]  # layers that the chunks from here on need
    counts = [0] * problem.num_chunks
    upstream = [0.0] * pp
    loads = [bounds.extra_ms(rank) + sum(fewest[rank::pp]) * bounds.fewest_ms for rank in range(pp)]
    found: list[tuple[float, Split]] = []

    def fill(chunk: int, start: int, passed_ms: float, reached_ms: float) -> None:
        """Tries all sizes of a chunk. The chunks before it take `passed_ms` and have the bound `reached_ms`."""
        rank, before = chunk % pp, loads[chunk % pp]
        if chunk < pp:
            upstream[rank] = passed_ms
        assumed_ms = extras[chunk].total_ms + fewest[chunk] * bounds.fewest_ms
        first = num_layers - start if chunk == last else fewest[chunk]
        for count in range(first, min(problem.most(chunk, alone), num_layers - start - needed_after[chunk + 1]) + 1):
            time_ms = sum(problem.chunk_time(chunk, start, start + count, alone))
            if is_interleaved:
                loads[rank] = before + time_ms - assumed_ms
                bound = max(reached_ms, bounds.work(rank, loads[rank], upstream[rank]))
            else:
                bound = max(reached_ms, bounds.stage(rank, start, start + count))
            if bound >= limit_ms * (1 - 1e-12):
                if is_interleaved:
                    break  # more layers only make this rank slower
                continue
            counts[chunk] = count
            if chunk == last:
                found.append((bound, Split(tuple(counts), alone)))
            else:
                fill(chunk + 1, start + count, passed_ms + time_ms, bound)
        loads[rank] = before

    fill(0, 0, 0.0, 0.0)
    return found


def blocking_exchanges(kind: ScheduleKind, rank: int) -> tuple[int, int, int]:
    """Blocking exchanges of a rank between its first and last call, after its first backward, before its last forward.

    Each further round of pp micro-batches adds equally many, so a long step is extrapolated from two short ones.
    """
    count, short = kind.num_microbatches, 4 * kind.pp + kind.num_microbatches % kind.pp
    if count <= short + kind.pp:
        return _count_blocking(kind, rank)
    one, two = (_count_blocking(replace(kind, num_microbatches=n), rank) for n in (short, short + kind.pp))
    rounds = (count - short) // kind.pp
    between, after, before = (a + (b - a) * rounds for a, b in zip(one, two, strict=True))
    return between, after, before


@lru_cache(maxsize=4096)
def _count_blocking(kind: ScheduleKind, rank: int) -> tuple[int, int, int]:
    program = rank_program(kind, rank)
    calls = [(idx, step) for idx, step in enumerate(program) if isinstance(step, Compute)]
    first, last = calls[0][0], calls[-1][0]
    first_backward = next(idx for idx, step in calls if not step.is_forward)
    last_forward = next(idx for idx, step in reversed(calls) if step.is_forward)
    blocking = [idx for idx, step in enumerate(program) if isinstance(step, Exchange) and step.is_blocking]
    return (
        sum(first < idx < last for idx in blocking),
        sum(first_backward < idx < last for idx in blocking),
        sum(first < idx < last_forward for idx in blocking),
    )
