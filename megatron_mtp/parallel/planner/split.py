"""The legal ways to cut a model into pipeline chunks, what each costs, and what none of them can undercut.

A split is the number of decoder layers of each chunk in execution order, and whether the MTP layers have a chunk before
the loss's. The embedding is on the first chunk, the loss on the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

from megatron_mtp.parallel.planner.part_costs import ZERO, PartTime
from megatron_mtp.parallel.planner.schedule import Compute, Exchange, ScheduleKind, rank_program
from megatron_mtp.parallel.planner.simulate import Work


@dataclass(frozen=True, slots=True)
class Split:
    """Decoder layers of each chunk in execution order; `is_standalone`: the MTP layers are in the last chunk but one."""

    counts: tuple[int, ...]
    is_standalone: bool = False


@dataclass(frozen=True, kw_only=True)
class SplitProblem:
    """What is to be cut, into what, at which cost.

    Args:
        layers: time of every decoder layer of one micro-batch.
        mtp: time of all depths together, without their passes through the head.
        loss: output head and loss of all depths.
        overhead: time of each call of a chunk beside its parts.
        final_norm: sits with the last decoder layer; without MTP with the loss.
        message_ms: time of one hidden state between neighbouring chunks.
        wide_message_ms: time of the 1+D hidden states from an MTP chunk of its own to the loss.
        shapes_ms: time of a message about shapes, which goes before each message if the MTP layers are apart.
        mtp_needs_layer: the MTP layers must share a chunk with the last decoder layer (mtp_hidden_source=pre_final_norm).
        is_beside_loss: the MTP layers are not to have a chunk before the loss's.
    """

    kind: ScheduleKind
    layers: tuple[PartTime, ...]
    embedding: PartTime = ZERO
    final_norm: PartTime = ZERO
    mtp: PartTime = ZERO
    loss: PartTime = ZERO
    overhead: PartTime = ZERO
    num_depths: int = 0
    message_ms: float = 0.0
    wide_message_ms: float = 0.0
    shapes_ms: float = 0.0
    mtp_needs_layer: bool = False
    is_beside_loss: bool = False

    @cached_property
    def num_chunks(self) -> int:
        """Of all ranks."""
        return self.kind.pp * self.kind.vp

    @property
    def may_stand_alone(self) -> bool:
        """Whether the MTP layers may have a chunk before the loss's: neither rank 0's nor, with two ranks, any."""
        return (
            self.num_depths > 0
            and not self.is_beside_loss
            and self.kind.pp > 2
            and len(self.layers) >= self.minimum(True)
        )

    def least(self, chunk: int, is_standalone: bool) -> int:
        """Fewest decoder layers of a chunk: no chunk is empty."""
        last = self.num_chunks - 1
        if is_standalone:
            return 0 if chunk in (0, last) else int(chunk < last - 1 or self.mtp_needs_layer)
        if chunk == last and self.num_depths and self.mtp_needs_layer:
            return 1
        return 0 if chunk in (0, last) else 1

    def most(self, chunk: int, is_standalone: bool) -> int:
        """Most decoder layers of a chunk: none beside the loss if the MTP layers come before it."""
        return 0 if is_standalone and chunk == self.num_chunks - 1 else len(self.layers)

    @cached_property
    def leasts(self) -> tuple[list[int], list[int]]:
        """`least` of all chunks, by is_standalone."""
        beside, apart = (
            [self.least(c, is_standalone) for c in range(self.num_chunks)] for is_standalone in (False, True)
        )
        return beside, apart

    def minimum(self, is_standalone: bool) -> int:
        """Fewest layers that fill all chunks."""
        return sum(self.leasts[is_standalone])

    def variants(self) -> list[bool]:
        """Values of Split.is_standalone to look at."""
        beside = [False] if len(self.layers) >= self.minimum(False) else []
        return beside + [True] * self.may_stand_alone

    def legal_splits(self) -> Iterator[Split]:
        """Every split that breaks no rule."""
        for is_standalone in self.variants():
            least = self.leasts[is_standalone]
            later = [*accumulate(reversed(least), initial=0)][::-1]  # layers that the chunks from here on need
            for counts in self._fill(0, len(self.layers), is_standalone, later):
                yield Split(counts, is_standalone)

    def _fill(self, chunk: int, left: int, is_standalone: bool, later: list[int]) -> Iterator[tuple[int, ...]]:
        least = self.leasts[is_standalone][chunk]
        if chunk == self.num_chunks - 1:
            if least <= left <= self.most(chunk, is_standalone):
                yield (left,)
            return
        for count in range(least, left - later[chunk + 1] + 1):
            for rest in self._fill(chunk + 1, left - count, is_standalone, later):
                yield (count, *rest)

    def num_legal(self, limit: int) -> int:
        """How many legal splits there are, not counted beyond `limit`."""
        total = 0
        for is_standalone in self.variants():
            ways = [1] + [0] * len(self.layers)  # ways[n]: of filling the chunks so far with n layers
            for chunk in range(self.num_chunks):
                least, most = self.least(chunk, is_standalone), self.most(chunk, is_standalone)
                sums = [0, *accumulate(ways)]
                ways = [
                    min(limit, sums[max(0, n - least + 1)] - sums[max(0, n - most)])
                    for n in range(len(self.layers) + 1)
                ]
            total += ways[-1]
        return min(limit, total)

    @cached_property
    def _sums(self) -> tuple[list[float], list[float]]:
        """Forward and backward time of the first n layers."""
        forward = [0.0, *accumulate(layer.forward_ms for layer in self.layers)]
        return forward, [0.0, *accumulate(layer.backward_ms for layer in self.layers)]

    def extras(self, chunk: int, is_standalone: bool) -> PartTime:
        """What a chunk holds beside decoder layers and the final norm of a model with MTP."""
        last = self.num_chunks - 1
        time = self.overhead
        if chunk == 0:
            time = time + self.embedding
        if chunk == last - is_standalone:
            time = time + self.mtp
        if chunk == last:
            time = time + self.loss
            if not self.num_depths:
                time = time + self.final_norm
        return time

    @cached_property
    def _extras(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """`extras` of all chunks in milliseconds forward and backward, by is_standalone."""
        beside, apart = (
            [(t.forward_ms, t.backward_ms) for t in (self.extras(c, is_standalone) for c in range(self.num_chunks))]
            for is_standalone in (False, True)
        )
        return beside, apart

    def chunk_time(self, chunk: int, start: int, stop: int, is_standalone: bool) -> tuple[float, float]:
        """Forward and backward time of a chunk that holds the layers start..stop-1."""
        forward, backward = self._sums
        more_forward, more_backward = self._extras[is_standalone][chunk]
        if self.num_depths and start < stop == len(self.layers):
            more_forward += self.final_norm.forward_ms
            more_backward += self.final_norm.backward_ms
        return forward[stop] - forward[start] + more_forward, backward[stop] - backward[start] + more_backward

    def chunk_totals(self, split: Split) -> list[float]:
        """Forward and backward time together of every chunk, in execution order."""
        times, start = [], 0
        for chunk, count in enumerate(split.counts):
            forward, backward = self.chunk_time(chunk, start, start + count, split.is_standalone)
            times.append(forward + backward)
            start += count
        return times

    def work(self, split: Split) -> Work:
        """The costs of one step."""
        pp, vp, times, start = self.kind.pp, self.kind.vp, [], 0
        for chunk, count in enumerate(split.counts):
            times.append(PartTime(*self.chunk_time(chunk, start, start + count, split.is_standalone)))
            start += count
        messages = [self.message_ms] * (self.num_chunks - 1)
        if split.is_standalone:
            messages[-1] = self.wide_message_ms
        return Work(
            chunks=tuple(tuple(times[v * pp + p] for v in range(vp)) for p in range(pp)),
            message_ms=tuple(messages),
            shapes_ms=self.shapes_ms if split.is_standalone else None,
        )

    def symbols(self, split: Split) -> list[str]:
        """The layout: a string of E, t, m and L for each chunk."""
        return [self.chunk_symbols(chunk, count, split.is_standalone) for chunk, count in enumerate(split.counts)]

    def chunk_symbols(self, chunk: int, count: int, is_standalone: bool) -> str:
        """Those of one chunk with `count` decoder layers."""
        last = self.num_chunks - 1
        depths = self.num_depths if chunk == last - is_standalone else 0
        return "E" * (chunk == 0) + "t" * count + "m" * depths + "L" * (chunk == last)


MANY_KINDS = 6
"""Of layers that are cheaper than the dearest; more are not told apart in the bound of the interleaved schedule."""


class Floor:
    """Lower bounds on the step time: paths through the schedule that every split must walk.

    For each rank p, with w calls in its warm-up and M micro-batches:
    - its own work, after the first micro-batch has come down to it and before the last gradient has gone back up;
    - without interleaving also: the first micro-batch's whole way forth and back to p, then all that p has left to do; and all that p
      does up to its last forward call, then that micro-batch's whole way forth and back.
    A message that is waited for where it is posted adds its time.
    """

    def __init__(self, problem: SplitProblem, is_standalone: bool):
        self.problem, self.is_standalone = problem, is_standalone
        kind = problem.kind
        self.message_ms = problem.message_ms + (problem.shapes_ms if is_standalone else 0.0)
        self.exchanges = [self._blocking_exchanges(rank) for rank in range(kind.pp)]
        extras = [problem.extras(chunk, is_standalone) for chunk in range(problem.num_chunks)]
        norm = problem.final_norm if problem.num_depths else ZERO
        layers = problem.layers
        self.total_forward = sum(t.forward_ms for t in (*layers, *extras, norm))
        self.total_backward = sum(t.backward_ms for t in (*layers, *extras, norm))
        self._cheapest_ms = min((t.forward_ms + t.backward_ms for t in layers), default=0.0)
        self._upstream = [0.0] * kind.pp

    def _blocking_exchanges(self, rank: int) -> tuple[int, int, int]:
        """Exchanges waited for at once: between the first and the last call, after the first backward and before the last forward call.

        Each further round adds equally many, so that a long step is counted from two short ones.
        """
        kind = self.problem.kind
        count, short = kind.num_microbatches, 4 * kind.pp + kind.num_microbatches % kind.pp
        if count <= short + kind.pp:
            return _count_exchanges(kind, rank)
        one, two = (_count_exchanges(replace(kind, num_microbatches=n), rank) for n in (short, short + kind.pp))
        rounds = (count - short) // kind.pp
        first, second, third = (a + (b - a) * rounds for a, b in zip(one, two, strict=True))
        return first, second, third

    def own_work(self, rank: int, load_ms: float, upstream_ms: float) -> float:
        """The first path.

        Args:
            load_ms: forward and backward time of one micro-batch in all chunks of the rank.
            upstream_ms: forward and backward time of the first chunks of the ranks before it.
        """
        count = self.problem.kind.num_microbatches
        return upstream_ms + 2 * rank * self.message_ms + count * load_ms + self.exchanges[rank][0] * self.message_ms

    def stage(self, rank: int, start: int, stop: int) -> float:
        """The highest of the paths of a rank that holds the layers start..stop-1; without interleaving."""
        forward, backward = self.problem.chunk_time(rank, start, stop, self.is_standalone)
        before_forward, before_backward = self.problem._sums
        own_ms, after_ms, before_ms, rest, count = self._stage_terms[rank]
        return max(
            own_ms + before_forward[start] + before_backward[start] + count * (forward + backward),
            after_ms + (count - 1) * backward + rest * forward,
            before_ms + (count - 1) * forward + rest * backward,
        )

    @cached_property
    def _stage_terms(self) -> list[tuple[float, float, float, int, int]]:
        """Of each rank: what its three paths hold beside layers and its own calls, calls of one direction after its warm-up, micro-batches."""
        problem, kind, terms = self.problem, self.problem.kind, []
        path = self.total_forward + self.total_backward + 2 * (kind.pp - 1) * self.message_ms
        overhead_ms = problem.overhead.forward_ms + problem.overhead.backward_ms
        for rank in range(kind.pp):
            upstream = problem.embedding if rank else ZERO
            upstream_ms = upstream.forward_ms + upstream.backward_ms + rank * overhead_ms
            _, after, before = self.exchanges[rank]
            rest = max(0, kind.num_microbatches - kind.num_warmup(rank) - 1)
            own_ms = self.own_work(rank, 0.0, upstream_ms)
            ways = (own_ms, path + after * self.message_ms, path + before * self.message_ms)
            terms.append((*ways, rest, kind.num_microbatches))
        return terms

    def of(self, counts: tuple[int, ...]) -> float:
        """For one split."""
        kind = self.problem.kind
        if kind.vp == 1:
            stops = list(accumulate(counts))
            return max(self.stage(rank, *span) for rank, span in enumerate(zip([0, *stops], stops, strict=False)))
        times = self.problem.chunk_totals(Split(counts, self.is_standalone))
        upstream = [0.0, *accumulate(times[: kind.pp])]
        return max(self.own_work(p, sum(times[p :: kind.pp]), upstream[p]) for p in range(kind.pp))

    def below(self, limit_ms: float) -> Iterator[tuple[float, tuple[int, ...]]]:
        """All splits whose bound is under the limit, with it. A branch of splits is left out as soon as the chunks that it has settled, with the fewest
        layers in the others, come to more."""
        counts = [0] * self.problem.num_chunks
        loads = [self._least_load(rank) for rank in range(self.problem.kind.pp)]
        later = [*accumulate(reversed(self.problem.leasts[self.is_standalone]), initial=0)][::-1]
        return self._below(0, 0, 0.0, 0.0, counts, loads, later, limit_ms)

    def _least_load(self, rank: int) -> float:
        """Time of a micro-batch in the chunks of a rank, if each holds as few layers as it may, all of the cheapest."""
        num_least = sum(self.problem.leasts[self.is_standalone][rank :: self.problem.kind.pp])
        return self._extra(rank) + num_least * self._cheapest_ms

    def _below(
        self,
        chunk: int,
        start: int,
        upstream_ms: float,
        bound_ms: float,
        counts: list[int],
        loads: list[float],
        later: list[int],
        limit_ms: float,
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        problem, is_standalone = self.problem, self.is_standalone
        num_layers, pp = len(problem.layers), problem.kind.pp
        rank, least, last = chunk % pp, problem.leasts[is_standalone][chunk], problem.num_chunks - 1
        fewest = self._cheapest_ms * least + sum(problem._extras[is_standalone][chunk])
        most = min(problem.most(chunk, is_standalone), num_layers - start - later[chunk + 1])
        before = loads[rank]
        for count in range(num_layers - start if chunk == last else least, most + 1):
            stop = start + count
            spent = sum(problem.chunk_time(chunk, start, stop, is_standalone))
            loads[rank] = before + spent - fewest
            if problem.kind.vp == 1:
                bound = max(bound_ms, self.stage(rank, start, stop))
            else:
                bound = max(
                    bound_ms, self.own_work(rank, loads[rank], upstream_ms if chunk < pp else self._upstream[rank])
                )
            if bound >= limit_ms * (1 - 1e-12):
                if problem.kind.vp > 1:
                    break  # more layers only make this rank slower
                continue
            counts[chunk] = count
            if chunk == last:
                yield bound, tuple(counts)
                continue
            if chunk < pp:
                self._upstream[rank] = upstream_ms
            yield from self._below(chunk + 1, stop, upstream_ms + spent, bound, counts, loads, later, limit_ms)
        loads[rank] = before

    @cached_property
    def least(self) -> float:
        """For every split: the least over all ways to deal out the layers, by the best of which no split is faster."""
        return self.suffixes()[0][0] if self.problem.kind.vp == 1 else self._by_loads()

    def suffixes(self, fits: Callable[[int, int, int, bool], bool] | None = None) -> list[list[float]]:
        """Without interleaving: `[p][n]` is the least that ranks p.. can come to if n layers are before them.

        Args:
            fits: whether a rank may hold a range of layers; infinite where none may.
        """
        problem, num_layers = self.problem, len(self.problem.layers)
        pp, infinite = problem.kind.pp, float("inf")
        table = [[infinite] * (num_layers + 1) for _ in range(pp)] + [[infinite] * num_layers + [0.0]]
        leasts = problem.leasts[self.is_standalone]
        for rank in reversed(range(pp)):
            least, most = leasts[rank], problem.most(rank, self.is_standalone)
            last_stop = num_layers - sum(leasts[rank + 1 :])  # later ranks need the rest
            for start in range(sum(leasts[:rank]), last_stop - least + 1) if rank else (0,):
                best = infinite
                for stop in range(start + least, min(start + most, last_stop) + 1):
                    if table[rank + 1][stop] >= best:
                        continue
                    if fits is not None and not fits(rank, start, stop, self.is_standalone):
                        break  # more layers never need less memory
                    here = self.stage(rank, start, stop)
                    best = min(best, max(here, table[rank + 1][stop]))
                    if here >= best and rank < pp - 1 and stop > start + least:
                        break  # more layers only make this rank slower
                table[rank][start] = best
        return table

    def _by_loads(self) -> float:
        """With interleaving: no rank's chunks need be neighbours, so only how many layers a rank holds is looked at."""
        problem, kind = self.problem, self.problem.kind
        costs = sorted(layer.forward_ms + layer.backward_ms for layer in problem.layers)
        cheap = [cost for cost in costs if cost < costs[-1] * (1 - 1e-9)]
        dear_ms = costs[-1]
        if len(cheap) > MANY_KINDS:  # too many kinds to tell apart: all as cheap as the cheapest
            cheap, dear_ms = [], costs[0]
        low = sum(self._extra(p) for p in range(kind.pp)) + sum(costs)
        low = kind.num_microbatches * low / kind.pp
        high = 4 * low + self.own_work(kind.pp - 1, sum(costs) + self._extra(0) + self._extra(kind.pp - 1), 0.0)
        if self._holds(low, cheap, dear_ms):
            return low
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._holds(middle, cheap, dear_ms) else (middle, high)
        return low

    def _extra(self, rank: int) -> float:
        """What a rank's chunks hold beside layers."""
        kind = self.problem.kind
        times = [self.problem.extras(v * kind.pp + rank, self.is_standalone) for v in range(kind.vp)]
        return sum(time.forward_ms + time.backward_ms for time in times)

    def _holds(self, limit_ms: float, cheap: list[float], dear_ms: float) -> bool:
        """Whether ranks that each stay below the limit can hold all layers: the more cheap ones a rank takes, the fewer dear ones."""
        problem, kind = self.problem, self.problem.kind
        cheapest = cheap[0] if cheap else dear_ms
        num_dear = len(problem.layers) - len(cheap)
        most_dear = [0] + [-1] * len(cheap)  # most dear layers so far, by the number of cheap ones; -1: impossible
        upstream = 0.0
        for rank in range(kind.pp):
            fixed = self.own_work(rank, self._extra(rank), upstream)
            room = (limit_ms - fixed) / kind.num_microbatches
            least = sum(problem.least(v * kind.pp + rank, self.is_standalone) for v in range(kind.vp))
            after = [-1] * len(most_dear)
            for before, dear in enumerate(most_dear):
                for taken in range(len(most_dear) - before) if dear >= 0 else ():
                    fits = int((room - taken * cheapest) / dear_ms + 1e-9)
                    if room - taken * cheapest >= -1e-9 and taken + fits >= least:
                        after[before + taken] = max(after[before + taken], dear + fits)
            most_dear = after
            first = problem.extras(rank, self.is_standalone)
            upstream += first.forward_ms + first.backward_ms + problem.least(rank, self.is_standalone) * cheapest
        return max(most_dear[-1:]) >= num_dear


@lru_cache(maxsize=4096)
def _count_exchanges(kind: ScheduleKind, rank: int) -> tuple[int, int, int]:
    """See `Floor._blocking_exchanges`."""
    program = rank_program(kind, rank)
    calls = [(idx, step) for idx, step in enumerate(program) if isinstance(step, Compute)]
    start, stop = calls[0][0], calls[-1][0]
    first_backward = next(idx for idx, step in calls if not step.is_forward)
    last_forward = next(idx for idx, step in reversed(calls) if step.is_forward)
    blocking = [idx for idx, step in enumerate(program) if isinstance(step, Exchange) and step.is_blocking]
    return (
        sum(start < idx < stop for idx in blocking),
        sum(first_backward < idx < stop for idx in blocking),
        sum(start < idx < last_forward for idx in blocking),
    )
