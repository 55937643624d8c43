"""The order of calls, messages and waits equals what Megatron-Core's own schedules do."""

from __future__ import annotations

import pytest

from megatron_mtp.parallel.planner.schedule import Compute, ScheduleKind, compute_order, rank_program

pytestmark = pytest.mark.unit

KINDS = [
    ScheduleKind(pp=pp, vp=vp, num_microbatches=count, sends_block=sends_block)
    for pp, vp, counts in [
        (2, 1, (1, 2, 5)),
        (3, 1, (1, 2, 3, 7)),
        (4, 1, (1, 3, 8)),
        (2, 2, (2, 4, 6)),
        (2, 3, (2, 4, 8)),
        (3, 2, (3, 6, 9)),
        (4, 2, (4, 8, 12)),
        (4, 3, (4, 8)),
        (8, 4, (8, 24)),
    ]
    for count in counts
    for sends_block in ((False, True) if vp > 1 else (False,))
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"pp{k.pp}vp{k.vp}mb{k.num_microbatches}{'b' * k.sends_block}")
def test_every_instruction_is_the_engines(kind):
    from tests.parallel.planner.megatron_program import megatron_program

    for rank in range(kind.pp):
        assert list(rank_program(kind, rank)) == megatron_program(kind, rank), f"rank {rank}"


def test_one_forward_one_backward_by_hand():
    kind = ScheduleKind(pp=2, vp=1, num_microbatches=3)
    assert text(kind, 0) == "F0 F1 B0 F2 B1 B2"
    assert text(kind, 1) == "F0 B0 F1 B1 F2 B2"


def test_interleaved_by_hand():
    """PP=2, two chunks a, b: groups of two micro-batches pass a, then b; rank 0 runs ahead by two calls."""
    kind = ScheduleKind(pp=2, vp=2, num_microbatches=4)
    assert text(kind, 1) == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"
    assert text(kind, 0) == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"


def text(kind: ScheduleKind, rank: int) -> str:
    def short(call: Compute) -> str:
        chunk = "abc"[call.vp_rank] if kind.vp > 1 else ""
        return f"{'F' if call.is_forward else 'B'}{call.micro_batch}{chunk}"

    return " ".join(short(call) for call in compute_order(kind, rank))
