"""Ready-made splits for the search to start from, and the splits next to one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, permutations, product

from megatron_mtp.parallel.planner.split import Split, SplitProblem

NUM_SEEDS = 40
"""Ready-made splits of the first kind; half as many at least of the second."""


def seeds(problem: SplitProblem) -> list[Split]:
    """Promising splits, best first: mostly those of `_uniform`, with those of `_staggered` in between."""
    uniform = sorted(dict.fromkeys(_uniform(problem)), key=lambda split: _pace_ms(problem, split))[:NUM_SEEDS]
    staggered = iter(_staggered(problem))
    found = []
    for idx, split in enumerate(uniform):
        found.append(split)
        if idx % 2:
            found += islice(staggered, 1)
    return list(dict.fromkeys([*found, *islice(staggered, NUM_SEEDS // 2)]))


def neighbours(problem: SplitProblem, split: Split) -> Iterator[Split]:
    """The splits with one layer moved: first from chunks that set the pace, and first to those with the most room."""
    pp, vp = problem.kind.pp, problem.kind.vp
    totals = problem.chunk_totals(split)
    loads = [sum(totals[rank::pp]) for rank in range(pp)]
    pace = [max(totals[v * pp : (v + 1) * pp]) for v in range(vp)]
    # By rank and then by virtual stage, so that ties are taken in that order.
    chunks = [v * pp + rank for rank in range(pp) for v in range(vp)]
    room = {chunk: pace[chunk // pp] - totals[chunk] + (max(loads) - loads[chunk % pp]) for chunk in chunks}
    by_room = sorted(room, key=room.__getitem__)
    for giver, taker in product(by_room, reversed(by_room)):
        counts = list(split.counts)
        counts[giver] -= 1
        counts[taker] += 1
        moved = Split(tuple(counts), split.is_standalone)
        if giver != taker and problem.is_legal(moved):
            yield moved


def _pace_ms(problem: SplitProblem, split: Split) -> float:
    """Time of a round if all ranks wait for the slowest chunk of each virtual stage; the more even split wins a tie."""
    times, pp = problem.chunk_totals(split), problem.kind.pp
    pace = sum(max(times[first : first + pp]) for first in range(0, len(times), pp))
    return pace + 1e-3 * max(sum(times[rank::pp]) for rank in range(pp)) + 1e-4 * max(times)


def _uniform(problem: SplitProblem) -> Iterator[Split]:
    """Splits in which all chunks of one virtual stage hold about equally many layers, those at the ends fewer.

    Under interleaving the ranks pass the same virtual stage at the same time, so its largest chunk sets the pace.
    """
    pp, vp, num_layers = problem.kind.pp, problem.kind.vp, len(problem.layers)
    base = -(-num_layers // (pp * vp))
    for is_standalone in problem.variants:
        for sizes in product(range(max(1, base - 1), base + 1 + (vp <= 4)), repeat=vp):
            full = [sizes[chunk // pp] for chunk in range(pp * vp)]
            if is_standalone:
                full[-1] = 0
            surplus = sum(full) - num_layers
            if 0 <= surplus < pp + base:
                yield from _trimmed(problem, full, surplus, is_standalone)


def _trimmed(problem: SplitProblem, full: list[int], surplus: int, is_standalone: bool) -> Iterator[Split]:
    """Takes `surplus` layers away: from the chunks with MTP and loss, from the first, then from the others in turn."""
    end = len(full) - 1 - is_standalone
    for at_end, at_start in product(range(min(full[end], surplus) + 1), range(min(full[0], surplus) + 1)):
        from_others = surplus - at_end - at_start
        if from_others < 0:
            continue
        orders: tuple[Iterable[int], ...] = (range(1, end), reversed(range(1, end)))
        for others in orders:
            counts, left = list(full), from_others
            counts[end] -= at_end
            counts[0] -= at_start
            for chunk in others:
                if left and counts[chunk] > 1:
                    counts[chunk] -= 1
                    left -= 1
            split = Split(tuple(counts), is_standalone)
            if not left and problem.is_legal(split):
                yield split


def _staggered(problem: SplitProblem) -> list[Split]:
    """Splits in which some ranks hold an extra layer in an early virtual stage and the others in a late one.

    If one more layer in all chunks of a virtual stage is too much, each rank waits for the others in another virtual
    stage. The most even ranks come first.
    """
    pp, vp, num_layers = problem.kind.pp, problem.kind.vp, len(problem.layers)
    base = num_layers // (pp * vp)
    found: dict[Split, tuple[float, int, int]] = {}
    for is_standalone, (early, late) in product(problem.variants, permutations(range(vp), 2)):
        others = [v for v in range(vp) if v not in (early, late)]
        for end in range(1 if is_standalone else base + 1):
            num_full, extra = divmod(num_layers - base * (pp * vp - 1) - end, pp)
            if num_full > len(others):
                continue
            for num_early in range(extra + 1):
                counts = [base + (chunk // pp in others[:num_full]) for chunk in range(pp * vp)]
                counts[-1] = end
                for rank in range(num_early):
                    counts[early * pp + rank] += 1
                for rank in range(pp - 1 - (extra - num_early), pp - 1):
                    counts[late * pp + rank] += 1
                split = Split(tuple(counts), is_standalone)
                if sum(counts) == num_layers and problem.is_legal(split):
                    times = problem.chunk_totals(split)
                    load_ms = max(sum(times[rank::pp]) for rank in range(pp))
                    found[split] = (round(load_ms, 3), abs(2 * num_early - extra), early - late)
    return sorted(found, key=found.__getitem__)
