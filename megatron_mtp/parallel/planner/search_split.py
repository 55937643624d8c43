"""Finds the split with the shortest simulated step, and a bound that proves how much better any other could be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, permutations, product

from megatron_mtp.parallel.planner.split import Floor, Split, SplitProblem
from megatron_mtp.parallel.planner.steady import step_time

FEW = 30_000
"""Legal splits that can be looked at one by one in about a second."""
FEW_EFFORT = 8
"""Times the effort, as many of them are simulated at most."""
NUM_SEEDS = 40
"""Ready-made splits that are simulated before single layers are moved."""

StageFits = Callable[[int, int, int, bool], bool]


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """The best split found.

    Args:
        step_ms: its simulated time.
        bound_ms: no legal split that fits is faster.
        num_simulated: splits that were simulated.
    """

    split: Split
    step_ms: float
    bound_ms: float
    num_simulated: int

    @property
    def gap(self) -> float:
        """By what share of its time another split could be faster; 0 is proven optimal."""
        return max(0.0, 1 - self.bound_ms / self.step_ms)


def best_split(
    problem: SplitProblem,
    *,
    fits: Callable[[Split], bool] | None = None,
    stage_fits: StageFits | None = None,
    effort: int = 150,
    tolerance: float = 1e-4,
    few: int = FEW,
    slowest_ms: float = float("inf"),
) -> SplitChoice | None:
    """The fastest legal split.

    Args:
        fits: whether a split may be taken at all, by its memory; None: all may.
        stage_fits: the same of a stage (rank, first layer, last layer + 1, is_standalone), without interleaving.
        effort: splits to simulate before the best so far is returned with its bound. A count and not a time, because every rank
            of a run works its layout out for itself.
        tolerance: the search ends within this share of its bound.
        few: up to this many legal splits are all bounded, and simulated in the order of their bounds until none can be better,
            or `FEW_EFFORT` times the effort is spent.
        slowest_ms: the search ends at once if the bound is no lower.

    Returns:
        None if no legal split fits, or none can be faster than `slowest_ms`.
    """
    search = _Search(problem, fits, stage_fits if problem.kind.vp == 1 else None, effort, 1 + tolerance)
    if not search.floors:
        return None
    if problem.num_legal(few) < few:
        return search.all()
    tables = {}
    if problem.kind.vp == 1:
        tables = {alone: floor.suffixes(search.stage_fits) for alone, floor in search.floors.items()}
        search.bound_ms = min(table[0][0] for table in tables.values())
    else:
        search.bound_ms = min(floor.least for floor in search.floors.values())
    if search.bound_ms >= slowest_ms:
        return None
    if tables:
        search.by_stages(tables)
    if not search.is_exhausted:
        search.by_seeds(_seeds(problem))
        search.by_moves()
    return search.result()


class _Search:
    """The best split so far, and what was simulated on the way."""

    def __init__(
        self,
        problem: SplitProblem,
        fits: Callable[[Split], bool] | None,
        stage_fits: StageFits | None,
        effort: int,
        near: float,
    ):
        self.problem, self.fits, self.stage_fits, self.effort, self.near = problem, fits, stage_fits, effort, near
        self.floors = {is_standalone: Floor(problem, is_standalone) for is_standalone in problem.variants()}
        self.best: Split | None = None
        self.best_ms = float("inf")
        self.seen: dict[Split, float] = {}
        self.bound_ms = 0.0
        self.is_exhausted = False

    def try_split(self, split: Split) -> float:
        """Its time; infinite if it does not fit."""
        if split not in self.seen:
            fits = self.fits is None or self.fits(split)
            self.seen[split] = step_time(self.problem.kind, self.problem.work(split)) if fits else float("inf")
        elapsed = self.seen[split]
        if elapsed < self.best_ms:
            self.best, self.best_ms = split, elapsed
        return elapsed

    @property
    def is_late(self) -> bool:
        """Whether the effort is spent, or nothing is left to gain."""
        most = self.effort if self.best is not None else self.effort * 2
        return len(self.seen) >= most or self.best_ms <= self.bound_ms * self.near

    def all(self) -> SplitChoice | None:
        """Of few legal splits: those that the best ready-made one does not rule out, in the order of their bounds. Exact if it ends before `FEW_EFFORT`
        times the effort is spent."""
        most = FEW_EFFORT * self.effort
        for split in _seeds(self.problem)[: 2 * self.problem.kind.vp]:
            self.try_split(split)
        ranked = sorted(
            (bound_ms, counts, is_standalone)
            for is_standalone, floor in self.floors.items()
            for bound_ms, counts in floor.below(self.best_ms)
        )
        self.is_exhausted = True
        for bound_ms, counts, is_standalone in ranked:
            if bound_ms >= self.best_ms:
                break
            if len(self.seen) >= most and self.best is not None:
                self.is_exhausted, self.bound_ms = False, bound_ms
                break
            self.try_split(Split(counts, is_standalone))
        return self.result()

    def by_stages(self, tables: dict[bool, list[list[float]]]) -> None:
        """Branch and bound over the stages in order. Exact if it ends before the effort is spent.

        Args:
            tables: `Floor.suffixes` of each variant.
        """
        ended = True
        for is_standalone, suffixes in sorted(tables.items(), key=lambda item: item[1][0][0]):
            ended &= self._branch(self.floors[is_standalone], suffixes, is_standalone, (), 0, 0.0)
        self.is_exhausted = ended

    def _branch(
        self,
        floor: Floor,
        suffixes: list[list[float]],
        is_standalone: bool,
        counts: tuple[int, ...],
        start: int,
        so_far: float,
    ) -> bool:
        rank, num_layers = len(counts), len(self.problem.layers)
        if rank == self.problem.kind.pp:
            self.try_split(Split(counts, is_standalone))
            return True
        options = []
        most = min(start + self.problem.most(rank, is_standalone), num_layers)
        for stop in range(start + self.problem.least(rank, is_standalone), most + 1):
            rest = suffixes[rank + 1][stop]
            if max(rest, so_far) < self.best_ms and self._stage_fits(rank, start, stop, is_standalone):
                bound = max(rest, so_far, floor.stage(rank, start, stop))
                options.append((bound, stop))
        for bound, stop in sorted(options):
            if bound >= self.best_ms:
                break
            if self.is_late:
                return False
            if not self._branch(floor, suffixes, is_standalone, (*counts, stop - start), stop, bound):
                return False
        return True

    def _stage_fits(self, rank: int, start: int, stop: int, is_standalone: bool) -> bool:
        return self.stage_fits is None or self.stage_fits(rank, start, stop, is_standalone)

    def by_seeds(self, seeds: Iterable[Split]) -> None:
        """Tries ready-made splits."""
        for split in seeds:
            if self.is_exhausted or self.is_late:
                return
            self.try_split(split)

    def by_moves(self) -> None:
        """Moves one layer from a chunk to another while that helps, those of the busiest rank first."""
        improved = not self.is_exhausted
        while improved and self.best is not None and not self.is_late:
            improved = False
            before, standing = self.best, self.best_ms
            for split in _neighbours(self.problem, before):
                if self.is_late:
                    break
                if self.floors[split.is_standalone].of(split.counts) < standing and self.try_split(split) < standing:
                    improved = True
                    break

    def result(self) -> SplitChoice | None:
        """What was found."""
        if self.best is None:
            return None
        bound_ms = self.best_ms if self.is_exhausted else self.bound_ms
        return SplitChoice(self.best, self.best_ms, min(bound_ms, self.best_ms), len(self.seen))


def _neighbours(problem: SplitProblem, split: Split) -> Iterable[Split]:
    """One layer moved; it leaves the chunks that set the pace first, and goes to those with the most room."""
    pp, vp, totals = problem.kind.pp, problem.kind.vp, problem.chunk_totals(split)
    times = [totals[p::pp] for p in range(pp)]
    pace = [max(times[p][v] for p in range(pp)) for v in range(vp)]
    room = {
        v * pp + p: pace[v] - times[p][v] + (max(map(sum, times)) - sum(times[p])) for p in range(pp) for v in range(vp)
    }
    order = sorted(room, key=room.__getitem__)
    for giver in order:
        for taker in reversed(order):
            counts = list(split.counts)
            counts[giver] -= 1
            counts[taker] += 1
            if giver != taker and _is_legal(problem, counts, split.is_standalone):
                yield Split(tuple(counts), split.is_standalone)


def _pace(problem: SplitProblem, split: Split) -> float:
    """Time of a round if all ranks wait for the slowest chunk of each virtual stage; ties go to the more even split."""
    times, pp = problem.chunk_totals(split), problem.kind.pp
    pace = sum(max(times[first : first + pp]) for first in range(0, len(times), pp))
    return pace + 1e-3 * max(sum(times[p::pp]) for p in range(pp)) + 1e-4 * max(times)


def _is_legal(problem: SplitProblem, counts: list[int], is_standalone: bool) -> bool:
    return all(
        problem.least(chunk, is_standalone) <= count <= problem.most(chunk, is_standalone)
        for chunk, count in enumerate(counts)
    )


def _seeds(problem: SplitProblem) -> list[Split]:
    """Splits in which all chunks of one virtual stage hold about equally many layers, those at the ends fewer.

    Under interleaving the ranks pass the same virtual stage at the same time, so the largest chunk of each sets the pace.
    """
    pp, vp, num_layers = problem.kind.pp, problem.kind.vp, len(problem.layers)
    base = -(-num_layers // (pp * vp))
    found = []
    for is_standalone in problem.variants():
        for sizes in product(range(max(1, base - 1), base + 1 + (vp <= 4)), repeat=vp):
            full = [sizes[chunk // pp] for chunk in range(pp * vp)]
            if is_standalone:
                full[-1] = 0
            surplus = sum(full) - num_layers
            if 0 <= surplus < pp + base:
                found += [Split(counts, is_standalone) for counts in _trimmed(problem, full, surplus, is_standalone)]
    paced = sorted(dict.fromkeys(found), key=lambda split: _pace(problem, split))[:NUM_SEEDS]
    staggered = iter(_staggered(problem))
    seeds = []
    for idx, split in enumerate(paced):
        seeds.append(split)
        if idx % 2:
            seeds += [*islice(staggered, 1)]
    return list(dict.fromkeys([*seeds, *islice(staggered, NUM_SEEDS // 2)]))


def _staggered(problem: SplitProblem) -> list[Split]:
    """Splits in which the first ranks hold a layer more in one virtual stage, and the ranks after them in another; the most even ranks first.

    Where a layer more in all chunks of a virtual stage is too much, each rank has to wait for those at another virtual stage at the time.
    """
    pp, vp, num_layers = problem.kind.pp, problem.kind.vp, len(problem.layers)
    base = num_layers // (pp * vp)
    found: dict[Split, tuple[float, int, int]] = {}
    for is_standalone, (early, late) in product(problem.variants(), permutations(range(vp), 2)):
        for end in range(1 if is_standalone else base + 1):
            whole, part = divmod(num_layers - base * (pp * vp - 1) - end, pp)
            others = [v for v in range(vp) if v not in (early, late)]
            for num_early in range(part + 1) if whole <= len(others) else ():
                counts = [base + (chunk // pp in others[:whole]) for chunk in range(pp * vp)]
                counts[-1] = end
                for rank in range(num_early):
                    counts[early * pp + rank] += 1
                for rank in range(pp - 1 - (part - num_early), pp - 1):
                    counts[late * pp + rank] += 1
                split = Split(tuple(counts), is_standalone)
                if sum(counts) == num_layers and _is_legal(problem, counts, is_standalone):
                    times = problem.chunk_totals(split)
                    load_ms = max(sum(times[rank::pp]) for rank in range(pp))
                    found[split] = (round(load_ms, 3), abs(2 * num_early - part), early - late)
    return sorted(found, key=found.__getitem__)


def _trimmed(problem: SplitProblem, full: list[int], surplus: int, is_standalone: bool) -> Iterable[tuple[int, ...]]:
    """Takes `surplus` layers away: from the chunks with MTP and loss, from the first, then from the others in turn."""
    end = len(full) - 1 - is_standalone
    for at_end, at_start in product(range(min(full[end], surplus) + 1), range(min(full[0], surplus) + 1)):
        left = surplus - at_end - at_start
        if left < 0:
            continue
        for others in (range(1, end), reversed(range(1, end))):
            counts, todo = list(full), left
            counts[end] -= at_end
            counts[0] -= at_start
            for chunk in others:
                if todo and counts[chunk] > 1:
                    counts[chunk] -= 1
                    todo -= 1
            if not todo and _is_legal(problem, counts, is_standalone):
                yield tuple(counts)
