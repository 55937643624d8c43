"""Schedules worked out by hand, what must hold for any times, and the short cut against the complete simulation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.parallel.planner.part_costs import PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.simulate import Work, compile_schedule, simulate
from megatron_mtp.parallel.planner.steady import PERIODS, repeating_parts, step_time

pytestmark = pytest.mark.unit


def work(chunks: list[list[tuple[float, float]]], message_ms: float = 0.0, shapes_ms: float | None = None) -> Work:
    """`chunks[pp_rank][vp_rank]` = (forward, backward)."""
    times = tuple(tuple(PartTime(*times) for times in rank) for rank in chunks)
    return Work(chunks=times, message_ms=(message_ms,) * (len(chunks) * len(chunks[0]) - 1), shapes_ms=shapes_ms)


def drawn(kind: ScheduleKind, costs: Work) -> list[str]:
    """One line for each rank: "F0 0-1" is the forward call of micro-batch 0 from 0 to 1 ms."""
    lines: list[list[str]] = [[] for _ in range(kind.pp)]
    for event in sorted(simulate(kind, costs).events, key=lambda event: event.start_ms):
        chunk = "abc"[event.vp_rank] if kind.vp > 1 else ""
        name = f"{'F' if event.is_forward else 'B'}{event.micro_batch}{chunk}"
        lines[event.pp_rank].append(f"{name} {event.start_ms:g}-{event.end_ms:g}")
    return [", ".join(line) for line in lines]


def test_two_stages_without_messages():
    kind = ScheduleKind(pp=2, vp=1, num_microbatches=2)
    assert drawn(kind, work([[(1, 2)], [(3, 4)]])) == [
        "F0 0-1, F1 1-2, B0 8-10, B1 15-17",
        "F0 1-4, B0 4-8, F1 8-11, B1 11-15",
    ]


def test_two_stages_whose_messages_take_a_millisecond():
    """Rank 0 waits for its first send; later sends and receives of a pair of calls travel together."""
    kind = ScheduleKind(pp=2, vp=1, num_microbatches=2)
    assert drawn(kind, work([[(1, 2)], [(3, 4)]], message_ms=1)) == [
        "F0 0-1, F1 2-3, B0 10-12, B1 18-20",
        "F0 2-5, B0 5-9, F1 10-13, B1 13-17",
    ]


def test_messages_about_shapes_go_first():
    """A standalone MTP stage: each message waits for one about its shape, half a millisecond here."""
    kind = ScheduleKind(pp=2, vp=1, num_microbatches=1)
    assert drawn(kind, work([[(1, 2)], [(3, 4)]], message_ms=1, shapes_ms=0.5)) == [
        "F0 0-1, B0 11-13",
        "F0 2.5-5.5, B0 5.5-9.5",
    ]


def test_a_send_waits_until_it_is_received():
    """Rank 1 is slow: it receives micro-batch 1 at 11, so rank 0's send ends there, and micro-batch 2 starts."""
    kind = ScheduleKind(pp=3, vp=1, num_microbatches=3)
    assert drawn(kind, work([[(1, 1)], [(10, 10)], [(1, 1)]])) == [
        "F0 0-1, F1 1-2, F2 11-12, B0 31-32, B1 51-52, B2 61-62",
        "F0 1-11, F1 11-21, B0 21-31, F2 31-41, B1 41-51, B2 51-61",
        "F0 11-12, B0 12-13, F1 21-22, B1 22-23, F2 41-42, B2 42-43",
    ]


def test_three_stages_fewer_micro_batches_than_stages():
    kind = ScheduleKind(pp=3, vp=1, num_microbatches=2)
    assert drawn(kind, work([[(1, 2)]] * 3)) == [
        "F0 0-1, F1 1-2, B0 7-9, B1 10-12",
        "F0 1-2, F1 2-3, B0 5-7, B1 8-10",
        "F0 2-3, B0 3-5, F1 5-6, B1 6-8",
    ]


def test_four_stages_in_full_swing():
    kind = ScheduleKind(pp=4, vp=1, num_microbatches=4)
    assert drawn(kind, work([[(1, 2)]] * 4)) == [
        "F0 0-1, F1 1-2, F2 2-3, F3 3-4, B0 10-12, B1 13-15, B2 16-18, B3 19-21",
        "F0 1-2, F1 2-3, F2 3-4, B0 8-10, F3 10-11, B1 11-13, B2 14-16, B3 17-19",
        "F0 2-3, F1 3-4, B0 6-8, F2 8-9, B1 9-11, F3 11-12, B2 12-14, B3 15-17",
        "F0 3-4, B0 4-6, F1 6-7, B1 7-9, F2 9-10, B2 10-12, F3 12-13, B3 13-15",
    ]


def test_interleaved_two_stages():
    kind = ScheduleKind(pp=2, vp=2, num_microbatches=2)
    assert drawn(kind, work([[(1, 2)] * 2] * 2)) == [
        "F0a 0-1, F1a 1-2, F0b 2-3, F1b 3-4, B0b 6-8, B1b 9-11, B0a 11-13, B1a 13-15",
        "F0a 1-2, F1a 2-3, F0b 3-4, B0b 4-6, F1b 6-7, B1b 7-9, B0a 9-11, B1a 11-13",
    ]


def test_interleaved_two_stages_whose_messages_take_half_a_millisecond():
    """Warm-up calls wait for their messages; in the steady part they travel while the other direction computes."""
    kind = ScheduleKind(pp=2, vp=2, num_microbatches=4)
    assert drawn(kind, work([[(1, 2)] * 2] * 2, message_ms=0.5)) == [
        "F0a 0-1, F1a 1.5-2.5, F0b 3-4, F1b 4.5-5.5, F2a 6-7, B0b 8-10, F3a 10-11, B1b 11-13, F2b 13-14, B0a 14-16, "
        "F3b 16-17, B1a 17-19, B2b 20-22, B3b 23-25, B2a 25.5-27.5, B3a 28-30",
        "F0a 1.5-2.5, F1a 3-4, F0b 4.5-5.5, B0b 5.5-7.5, F1b 7.5-8.5, B1b 8.5-10.5, F2a 10.5-11.5, B0a 11.5-13.5, "
        "F3a 13.5-14.5, B1a 14.5-16.5, F2b 16.5-17.5, B2b 17.5-19.5, F3b 19.5-20.5, B3b 20.5-22.5, "
        "B2a 23-25, B3a 25.5-27.5",
    ]


def test_interleaved_three_stages():
    kind = ScheduleKind(pp=3, vp=2, num_microbatches=3)
    assert drawn(kind, work([[(1, 2)] * 2] * 3)) == [
        "F0a 0-1, F1a 1-2, F2a 2-3, F0b 3-4, F1b 4-5, F2b 5-6, B0b 10-12, B1b 14-16, B2b 16-18, "
        "B0a 18-20, B1a 20-22, B2a 22-24",
        "F0a 1-2, F1a 2-3, F2a 3-4, F0b 4-5, F1b 5-6, F2b 6-7, B0b 8-10, B1b 11-13, B2b 14-16, "
        "B0a 16-18, B1a 18-20, B2a 20-22",
        "F0a 2-3, F1a 3-4, F2a 4-5, F0b 5-6, B0b 6-8, F1b 8-9, B1b 9-11, F2b 11-12, B2b 12-14, "
        "B0a 14-16, B1a 16-18, B2a 18-20",
    ]


def test_interleaved_four_stages():
    kind = ScheduleKind(pp=4, vp=2, num_microbatches=4)
    lines = drawn(kind, work([[(1, 1)] * 2] * 4))
    assert lines[3] == (
        "F0a 3-4, F1a 4-5, F2a 5-6, F3a 6-7, F0b 7-8, B0b 8-9, F1b 9-10, B1b 10-11, F2b 11-12, B2b 12-13, F3b 13-14, "
        "B3b 14-15, B0a 15-16, B1a 16-17, B2a 17-18, B3a 18-19"
    )
    assert lines[0] == (
        "F0a 0-1, F1a 1-2, F2a 2-3, F3a 3-4, F0b 4-5, F1b 5-6, F2b 6-7, F3b 7-8, B0b 11-12, "
        "B1b 15-16, B2b 16-17, B3b 17-18, "
        "B0a 18-19, B1a 19-20, B2a 20-21, B3a 21-22"
    )


@st.composite
def cases(draw, max_rounds: int = 3) -> tuple[ScheduleKind, Work]:
    pp, vp = draw(st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2), (2, 3), (4, 3)]))
    count = draw(st.integers(1, max_rounds)) * pp + (draw(st.integers(0, pp - 1)) if vp == 1 else 0)
    kind = ScheduleKind(pp=pp, vp=vp, num_microbatches=count, sends_block=draw(st.booleans()))
    times = st.tuples(st.integers(1, 9), st.integers(1, 9))
    chunks = [[draw(times) for _ in range(vp)] for _ in range(pp)]
    return kind, work(chunks, draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([None, 0, 1])))


@settings(deadline=None)
@given(cases())
def test_every_call_happens_once_after_what_it_needs(case):
    kind, costs = case
    line = simulate(kind, costs)
    ends = {(e.vp_rank * kind.pp + e.pp_rank, e.micro_batch, e.is_forward): e.end_ms for e in line.events}
    num_chunks = kind.pp * kind.vp
    assert len(ends) == len(line.events) == 2 * num_chunks * kind.num_microbatches
    rank_clock = [0.0] * kind.pp
    for event in sorted(line.events, key=lambda e: (e.start_ms, e.end_ms)):
        chunk = event.vp_rank * kind.pp + event.pp_rank
        before = (chunk - 1 if event.is_forward else chunk + 1, event.micro_batch, event.is_forward)
        if before in ends:
            assert event.start_ms >= ends[before] + costs.message_ms[0] - 1e-9
        if not event.is_forward:
            assert event.start_ms >= ends[chunk, event.micro_batch, True] - 1e-9
        assert event.start_ms >= rank_clock[event.pp_rank] - 1e-9, "a rank does one thing at a time"
        rank_clock[event.pp_rank] = event.end_ms
    assert line.total_ms >= max(rank_clock) - 1e-9


@settings(deadline=None)
@given(cases())
def test_equal_chunks_without_messages_take_the_textbook_time(case):
    kind, _ = case
    total = simulate(kind, work([[(2, 3)] * kind.vp] * kind.pp)).total_ms
    assert total == pytest.approx(5 * (kind.num_microbatches * kind.vp + kind.pp - 1))


@settings(deadline=None, max_examples=60)
@given(cases(max_rounds=40))
def test_the_short_cut_equals_the_complete_simulation(case):
    kind, costs = case
    complete = compile_schedule(kind, costs.shapes_ms is not None).total(costs.costs())
    assert step_time(kind, costs) == pytest.approx(complete, rel=1e-9)


def test_the_short_cut_is_taken():
    kind = ScheduleKind(pp=4, vp=2, num_microbatches=4_000_000)
    assert step_time(kind, work([[(2, 3)] * 2] * 4)) == pytest.approx(5 * (8_000_000 + 3))


@pytest.mark.parametrize(("pp", "vp"), [(2, 1), (3, 1), (8, 1), (2, 2), (2, 4), (3, 2), (3, 3), (4, 2), (5, 2), (6, 2)])
@pytest.mark.parametrize("exchanges_shapes", [False, True])
@pytest.mark.parametrize("sends_block", [False, True])
def test_every_schedule_repeats(pp, vp, exchanges_shapes, sends_block):
    """Else each split would be simulated micro-batch by micro-batch: seconds with a thousand of them."""
    kind = ScheduleKind(pp=pp, vp=vp, num_microbatches=3 * pp, sends_block=sends_block)
    assert any(repeating_parts(kind, period * pp, exchanges_shapes) for period in PERIODS)
