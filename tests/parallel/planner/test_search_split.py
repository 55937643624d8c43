"""The planner's split equals brute force where that is possible, and its bound is never above a simulated split."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.planner.bounds import RankBounds, lowest_by_loads, lowest_by_stages, splits_below
from megatron_mtp.parallel.planner.part_costs import PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.search_split import best_split
from megatron_mtp.parallel.planner.simulate import compile_schedule
from megatron_mtp.parallel.planner.split import Split, SplitProblem

pytestmark = pytest.mark.unit

NUM_INSTANCES = 300


def part(dice: random.Random, low: float, high: float) -> PartTime:
    return PartTime(dice.uniform(low, high), dice.uniform(low, 2 * high))


def instance(seed: int) -> SplitProblem:
    """Up to 12 layers, 4 stages and 3 virtual stages, random costs; every second one has two kinds of layers."""
    dice = random.Random(seed)
    while True:
        pp, vp, num_layers = dice.randint(2, 4), dice.choice([1, 1, 2, 3]), dice.randint(2, 12)
        depths = dice.choice([0, 1, 2])
        count = pp * dice.randint(1, 3) if vp > 1 else dice.randint(1, 10)
        kinds = [part(dice, 0.5, 2) for _ in range(num_layers if seed % 2 else 2)]
        message_ms = dice.choice([0, 0.05, 0.5])
        problem = SplitProblem(
            kind=ScheduleKind(pp=pp, vp=vp, num_microbatches=count, sends_block=dice.random() < 0.5),
            layers=tuple(sorted((kinds * num_layers)[:num_layers], key=kinds.index)),
            embedding=part(dice, 0, 1),
            final_norm=part(dice, 0, 0.1),
            mtp=part(dice, 0.5, 3) * (depths > 0),
            loss=part(dice, 0, 3),
            overhead=part(dice, 0, 0.2),
            num_depths=depths,
            message_ms=message_ms,
            wide_message_ms=message_ms * (1 + depths),
            shapes_ms=dice.choice([0, 0.1]),
            mtp_needs_layer=dice.random() < 0.15,
        )
        if problem.variants:
            return problem


def legal_splits(problem: SplitProblem) -> list[Split]:
    """Every way to write the symbols in chunks that config/layout_text.py accepts, found without the planner's help."""
    kind, num_layers, num_chunks = problem.kind, len(problem.layers), problem.num_chunks
    found = []
    for borders in combinations(range(num_layers + num_chunks - 1), num_chunks - 1):
        stops = (-1, *borders, num_layers + num_chunks - 1)
        counts = tuple(stop - start - 1 for start, stop in pairwise(stops))
        if 0 in counts[1 : num_chunks - 2]:
            continue  # refused below too; left out here to save time
        for is_standalone in (False, True) if problem.num_depths else (False,):
            chunks = ["t" * count for count in counts]
            chunks[0] = "E" + chunks[0]
            chunks[-1 - is_standalone] += "m" * problem.num_depths
            chunks[-1] += "L"
            _, problems = layout_chunks(
                "|".join(chunks), num_layers=num_layers, num_depths=problem.num_depths, pp=kind.pp, vp=kind.vp
            )
            mtp_chunk = next((chunk for chunk in chunks if "m" in chunk), "t")
            if not problems and not (problem.mtp_needs_layer and "t" not in mtp_chunk):
                found.append(Split(counts, is_standalone))
    return found


def simulated(problem: SplitProblem, split: Split) -> float:
    work = problem.work(split)
    return compile_schedule(problem.kind, work.shapes_ms is not None).total(work.costs())


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))])
def test_it_equals_brute_force(part: int):
    checked = 0
    for seed in range(part, NUM_INSTANCES, 4):
        problem = instance(seed)
        choice = best_split(problem)
        assert choice is not None
        splits = legal_splits(problem)
        assert len(splits) == problem.num_legal(10**9)
        times = [simulated(problem, split) for split in splits]
        assert choice.step_ms == pytest.approx(min(times), rel=1e-9), f"instance {seed}"
        assert choice.gap == 0
        assert simulated(problem, choice.split) == pytest.approx(choice.step_ms, rel=1e-9)
        for split, elapsed in list(zip(splits, times, strict=True))[:: 1 + len(splits) // 50]:
            assert RankBounds(problem, split.is_standalone).split(split) <= elapsed * (1 + 1e-9)
        for is_standalone in problem.variants:
            best_ms = min(ms for split, ms in zip(splits, times, strict=True) if split.is_standalone == is_standalone)
            bounds = RankBounds(problem, is_standalone)
            lowest = lowest_by_stages(bounds)[0][0] if problem.kind.vp == 1 else lowest_by_loads(bounds)
            assert lowest <= best_ms * (1 + 1e-9)
            below = {split for _, split in splits_below(bounds, best_ms * 1.05)}
            assert below == {
                split
                for split in splits
                if split.is_standalone == is_standalone and bounds.split(split) < best_ms * 1.05 * (1 - 1e-12)
            }
        checked += len(splits)
    assert checked > 4_000


def large(pp: int, vp: int, count: int, depths: int = 1, num_layers: int = 61) -> SplitProblem:
    """The proportions of DeepSeek-V3."""
    dense, moe = PartTime(6.0, 12.0), PartTime(7.0, 14.0)
    return SplitProblem(
        kind=ScheduleKind(pp=pp, vp=vp, num_microbatches=count, sends_block=True),
        layers=(dense,) * 3 + (moe,) * (num_layers - 3),
        embedding=PartTime(0.1, 0.2),
        final_norm=PartTime(0.05, 0.1),
        mtp=PartTime(7.6, 15.2) * depths,
        loss=PartTime(1.9, 5.0) * (1 + depths),
        overhead=PartTime(0.05, 0.05),
        num_depths=depths,
        message_ms=0.15,
        wide_message_ms=0.15 * (1 + depths),
        shapes_ms=0.02,
    )


@pytest.mark.parametrize(("pp", "vp"), [(8, 1), (16, 1), (8, 2), (8, 4), (16, 4)])
def test_large_models_come_close_to_the_bound(pp, vp):
    problem = large(pp, vp, 480)
    choice = best_split(problem)
    assert choice is not None
    assert choice.gap <= 0.02
    assert sum(choice.split.counts) == 61
    layout = problem.layout(choice.split)
    assert Split.of(layout) == choice.split
    _, problems = layout_chunks(layout.string, num_layers=61, num_depths=1, pp=pp, vp=vp)
    assert not problems


def test_three_virtual_stages_are_staggered():
    """Sixteen ranks: the extra layer is in the first virtual stage of some ranks, and in the last one of others."""
    choice = best_split(large(16, 3, 480))
    assert choice is not None
    assert choice.step_ms <= 43_714
    assert choice.gap <= 0.08


def test_a_split_that_does_not_fit_is_not_taken():
    problem = large(4, 1, 32)
    free = best_split(problem)
    bound = best_split(
        problem,
        fits=lambda split: split.counts[0] <= 10,
        stage_fits=lambda rank, start, stop, is_standalone: rank > 0 or stop <= 10,
    )
    assert free is not None
    assert bound is not None
    assert free.split.counts[0] > 10 >= bound.split.counts[0]
    assert bound.step_ms > free.step_ms
    assert best_split(problem, fits=lambda split: False) is None


def test_a_limit_is_kept_with_virtual_stages():
    problem = large(4, 2, 32)
    choice = best_split(problem, fits=lambda split: max(split.counts) <= 8)
    assert choice is not None
    assert max(choice.split.counts) == 8


def test_a_search_that_cannot_win_says_so_and_does_not_blame_memory():
    with pytest.raises(PlanError, match="are to be beaten"):
        best_split(large(8, 1, 480), to_beat_ms=1.0)


def test_too_few_layers():
    assert best_split(large(8, 4, 8, depths=0, num_layers=29)) is None
