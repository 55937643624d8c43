"""Finds the split with the shortest simulated step, and a bound that proves how much faster any other could be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.planner.bounds import RankBounds, StageFits, lowest_by_loads, lowest_by_stages, splits_below
from megatron_mtp.parallel.planner.seeds import neighbours, seeds
from megatron_mtp.parallel.planner.split import Split, SplitProblem
from megatron_mtp.parallel.planner.steady import step_time

FEW = 30_000
"""Number of legal splits below which all of them get a bound, which takes about a second."""
FEW_EFFORT = 8
"""Factor on the effort where all legal splits get a bound."""
MOST_CALLS = 200_000
"""Calls in a round of the schedule times splits to simulate, which take about two seconds; more lower the effort."""
LARGEST_TABLE = 1_000_000
"""Stages times layers squared up to which the bounds of all stages are tabulated, which takes seconds."""
NEAR = 1.0001
"""The search ends within this factor of its bound."""
SplitFits = Callable[[Split], bool]


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """The best split found.

    Args:
        step_ms: its simulated time.
        bound_ms: no legal split that fits is faster.
    """

    split: Split
    step_ms: float
    bound_ms: float

    @property
    def gap(self) -> float:
        """The share of its time by which another split could be faster; 0 is proven optimal."""
        return max(0.0, 1 - self.bound_ms / self.step_ms)


def best_split(
    problem: SplitProblem,
    *,
    fits: SplitFits | None = None,
    stage_fits: StageFits | None = None,
    effort: int = 150,
    few: int = FEW,
    to_beat_ms: float = inf,
) -> SplitChoice | None:
    """The fastest legal split.

    Args:
        fits: whether a split fits the memory; None: all do.
        stage_fits: the same for a single stage, without interleaving.
        effort: splits to simulate before the best one so far is returned with its bound. A count and not a time,
            because every rank of a run works its layout out for itself.
        few: with fewer legal splits than this, all get a bound and are simulated in its order, until none can be better
            or `FEW_EFFORT` times the effort is spent.
        to_beat_ms: the search ends at once if its bound is no lower.

    Returns:
        None if no legal split fits.

    Raises:
        PlanError: no split can be faster than `to_beat_ms`.
    """
    search = _Search(problem, fits, stage_fits if problem.kind.vp == 1 else None, effort)
    if not search.bounds:
        return None
    if problem.num_legal(few) < few:
        search.by_bounds()
        return search.result()
    tables = {}
    if problem.kind.vp == 1 and problem.kind.pp * len(problem.layers) ** 2 <= LARGEST_TABLE:
        tables = {alone: lowest_by_stages(bounds, search.stage_fits) for alone, bounds in search.bounds.items()}
        search.bound_ms = min(table[0][0] for table in tables.values())
    else:
        search.bound_ms = min(lowest_by_loads(bounds) for bounds in search.bounds.values())
    if search.bound_ms == inf:
        return None
    if search.bound_ms >= to_beat_ms:
        raise PlanError(f"no split takes less than {search.bound_ms:.1f} ms, and {to_beat_ms:.1f} ms are to be beaten")
    if tables:
        search.by_stages(tables)
    if not search.is_exhausted:
        search.by_seeds()
        search.by_moves()
    return search.result()


class _Search:
    """The best split so far, and what was simulated on the way.

    Attributes:
        bounds: by is_standalone.
        is_exhausted: no split that was left out can be better than the best one.
    """

    def __init__(self, problem: SplitProblem, fits: SplitFits | None, stage_fits: StageFits | None, effort: int):
        self.problem, self.fits, self.stage_fits = problem, fits, stage_fits
        self.effort = min(effort, max(1, MOST_CALLS // (problem.kind.pp**2 * problem.kind.vp)))
        self.bounds = {is_standalone: RankBounds(problem, is_standalone) for is_standalone in problem.variants}
        self.best: Split | None = None
        self.best_ms = inf
        self.seen: dict[Split, float] = {}
        self.bound_ms = 0.0
        self.is_exhausted = False

    def try_split(self, split: Split) -> float:
        """Simulates a split unless that was done before; infinite if it does not fit."""
        if split not in self.seen:
            fits = self.fits is None or self.fits(split)
            self.seen[split] = step_time(self.problem.kind, self.problem.work(split)) if fits else inf
        elapsed = self.seen[split]
        if elapsed < self.best_ms:
            self.best, self.best_ms = split, elapsed
        return elapsed

    @property
    def is_over(self) -> bool:
        """Whether the effort is spent, or nothing is left to gain."""
        most = self.effort if self.best is not None else self.effort * 2
        return len(self.seen) >= most or self.best_ms <= self.bound_ms * NEAR

    def by_bounds(self) -> None:
        """Simulates the splits whose bounds are below the best time, lowest bound first.

        Exact if it ends before `FEW_EFFORT` times the effort is spent.
        """
        for split in seeds(self.problem)[: 2 * self.problem.kind.vp]:
            self.try_split(split)
        ranked = sorted(pair for bounds in self.bounds.values() for pair in splits_below(bounds, self.best_ms))
        for bound_ms, split in ranked:
            if bound_ms >= self.best_ms:
                break
            if len(self.seen) >= FEW_EFFORT * self.effort and self.best is not None:
                self.bound_ms = bound_ms
                return
            self.try_split(split)
        self.is_exhausted = True

    def by_stages(self, tables: dict[bool, list[list[float]]]) -> None:
        """Branch and bound over the stages in order. Exact if it ends before the effort is spent.

        Args:
            tables: `lowest_by_stages` of each variant.
        """
        lowest_first = sorted(tables, key=lambda is_standalone: tables[is_standalone][0][0])
        ended = [self._branch(tables[alone], Split((), alone), 0, 0.0) for alone in lowest_first]
        self.is_exhausted = all(ended)

    def _branch(self, table: list[list[float]], begun: Split, start: int, reached_ms: float) -> bool:
        """Tries all ways to go on from the first stages; whether it got to the end of them.

        Args:
            begun: the first stages.
            start: layers that they hold.
            reached_ms: their bound.
        """
        problem, rank, alone = self.problem, len(begun.counts), begun.is_standalone
        if rank == problem.kind.pp:
            self.try_split(begun)
            return True
        options = []
        last_stop = min(start + problem.most(rank, alone), len(problem.layers))
        for stop in range(start + problem.fewest(rank, alone), last_stop + 1):
            at_least_ms = max(table[rank + 1][stop], reached_ms)
            if at_least_ms < self.best_ms and (self.stage_fits is None or self.stage_fits(rank, start, stop, alone)):
                options.append((max(at_least_ms, self.bounds[alone].stage(rank, start, stop)), stop))
        for bound_ms, stop in sorted(options):
            if bound_ms >= self.best_ms:
                break
            if self.is_over:
                return False
            if not self._branch(table, Split((*begun.counts, stop - start), alone), stop, bound_ms):
                return False
        return True

    def by_seeds(self) -> None:
        """Tries ready-made splits."""
        for split in seeds(self.problem):
            if self.is_over:
                return
            self.try_split(split)

    def by_moves(self) -> None:
        """Moves one layer from a chunk to another as long as that helps."""
        improved = True
        while improved and self.best is not None and not self.is_over:
            improved = False
            before_ms = self.best_ms
            for split in neighbours(self.problem, self.best):
                if self.is_over:
                    break
                if self.bounds[split.is_standalone].split(split) < before_ms and self.try_split(split) < before_ms:
                    improved = True
                    break

    def result(self) -> SplitChoice | None:
        """What was found; None if nothing fits."""
        if self.best is None:
            return None
        bound_ms = self.best_ms if self.is_exhausted else self.bound_ms
        return SplitChoice(self.best, self.best_ms, min(bound_ms, self.best_ms))
