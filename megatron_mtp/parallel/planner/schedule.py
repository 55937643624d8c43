"""The instructions of each pipeline rank in one step, in the order of Megatron-Core's schedules. Pure data.

A rank's program is a tuple of instructions. `Compute` is one call of a chunk. `Exchange` posts messages to and from the
neighbours and, if it is blocking, waits for all of them. `Wait` waits for one message that was posted before.

A message is (is_gradient, boundary, micro-batch): the activations that chunk `boundary` hands to the next chunk, or the
gradients of them on their way back. Chunks are counted in execution order: chunk v * pp + p sits on rank p as its
virtual stage v.

Source: megatron-core 0.19.2, pipeline_parallel/schedules.py, `forward_backward_pipelining_without_interleaving` and
`forward_backward_pipelining_with_interleaving` with overlap_p2p_comm, which is how this project runs them
(model/transformer_config.py). The order of calls is compared with recorded runs in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

Message = tuple[bool, int, int]


class Compute(NamedTuple):
    """One forward or backward call of a chunk."""

    is_forward: bool
    vp_rank: int
    micro_batch: int


class Exchange(NamedTuple):
    """Messages posted together."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    is_blocking: bool


class Wait(NamedTuple):
    """Wait for a message that an earlier Exchange posted."""

    message: Message


Instruction = Compute | Exchange | Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleKind:
    """Everything that the order of instructions depends on.

    Args:
        pp: pipeline size.
        vp: chunks of each rank; above 1 the interleaved schedule runs.
        num_microbatches: micro-batches of one rank in one step; with vp above 1 a multiple of pp.
        sends_block: a forward send is waited for at once, because its buffer is freed (deallocate_pipeline_outputs, on
            GPUs). Without interleaving every send is.
    """

    pp: int
    vp: int
    num_microbatches: int
    sends_block: bool = False

    def num_warmup(self, rank: int) -> int:
        """Forward calls of a rank before its first backward call is due."""
        if self.vp == 1:
            return min(self.pp - rank - 1, self.num_microbatches)
        wanted = 2 * (self.pp - rank - 1) + (self.vp - 1) * self.pp
        return min(wanted, self.num_microbatches * self.vp)


@lru_cache(maxsize=512)
def rank_program(kind: ScheduleKind, rank: int) -> tuple[Instruction, ...]:
    """The program of one rank."""
    return tuple(_plain(kind, rank) if kind.vp == 1 else _Interleaved(kind, rank).program)


def compute_order(kind: ScheduleKind, rank: int) -> list[Compute]:
    """The calls of one rank in order."""
    return [step for step in rank_program(kind, rank) if isinstance(step, Compute)]


def _plain(kind: ScheduleKind, rank: int) -> list[Instruction]:
    """1F1B: warm-up forward calls, then one forward and one backward call in turn, then the other backward calls."""
    program: list[Instruction] = []
    num_warmup, total = kind.num_warmup(rank), kind.num_microbatches

    def exchange(send: Message | None, receive: Message | None) -> None:
        """There is no boundary before the first rank and after the last."""
        sends, receives = ((m,) if m and 0 <= m[1] < kind.pp - 1 else () for m in (send, receive))
        if sends or receives:
            program.append(Exchange(sends, receives, True))

    before, after = rank - 1, rank
    for idx in range(num_warmup):
        exchange(None, (False, before, idx))
        program.append(Compute(True, 0, idx))
        exchange((False, after, idx), None)
    if num_warmup < total:
        exchange(None, (False, before, num_warmup))
    for idx in range(total - num_warmup):
        program.append(Compute(True, 0, num_warmup + idx))
        exchange((False, after, num_warmup + idx), (True, after, idx))
        program.append(Compute(False, 0, idx))
        following = num_warmup + idx + 1
        exchange((True, before, idx), (False, before, following) if following < total else None)
    for idx in range(total - num_warmup, total):
        exchange(None, (True, after, idx))
        program.append(Compute(False, 0, idx))
        exchange((True, before, idx), None)
    return program


class _Interleaved:
    """Interleaved 1F1B with overlapped messages in its steady part and blocking ones in warm-up and cool-down.

    A receive for the next call is posted together with the send of the current one, so that it travels meanwhile. The
    names follow Megatron-Core's: `k` counts calls of this rank in one direction, over all its chunks.
    """

    def __init__(self, kind: ScheduleKind, rank: int):
        self.kind, self.rank = kind, rank
        self.is_first, self.is_last = rank == 0, rank == kind.pp - 1
        pp, total = kind.pp, kind.num_microbatches
        # Groups of pp micro-batches pass each chunk in turn (microbatch_group_size_per_vp_stage = pp).
        groups = range(0, total, pp)
        self.table = [
            (mb, v) for first in groups for v in range(kind.vp) for mb in range(first, min(first + pp, total))
        ]
        self.num_warmup = kind.num_warmup(rank)
        self.is_all_warmup = self.num_warmup == len(self.table)
        self.program: list[Instruction] = []
        self.receives: dict[bool, list[Message]] = {False: [], True: []}  # posted, not waited for
        self.last_send: dict[bool, Message | None] = {False: None, True: None}
        self._warm_up()
        self._steady()
        self._cool_down()

    def call(self, k: int, is_forward: bool) -> tuple[int, int]:
        """(micro-batch, virtual stage) of the k-th call in one direction."""
        micro_batch, v = self.table[k]
        return micro_batch, v if is_forward else self.kind.vp - 1 - v

    def sent(self, k: int, is_forward: bool) -> Message | None:
        """What the k-th call sends; None at the end of the pipeline."""
        micro_batch, v = self.call(k, is_forward)
        chunk = v * self.kind.pp + self.rank
        if is_forward:
            return None if chunk == self.kind.pp * self.kind.vp - 1 else (False, chunk, micro_batch)
        return None if chunk == 0 else (True, chunk - 1, micro_batch)

    def awaited(self, k: int, is_forward: bool) -> Message | None:
        """The message whose receive is posted with the k-th call (Megatron-Core's recv_tensor_from_previous_stage).

        The first rank of a direction lags the last one, whose output it receives, by pp - 1 calls.
        """
        pp, vp = self.kind.pp, self.kind.vp
        is_leading = self.is_first if is_forward else self.is_last
        if not is_leading:
            if k + 1 >= len(self.table):
                return None
            micro_batch, v = self.call(k + 1, is_forward)
            chunk = v * pp + self.rank
            return (False, chunk - 1, micro_batch) if is_forward else (True, chunk, micro_batch)
        if k < pp - 1:
            return None
        micro_batch, v = self.call(k - (pp - 1), is_forward)
        if is_forward:
            return None if v == vp - 1 else (False, v * pp + pp - 1, micro_batch)
        return None if v == 0 else (True, v * pp - 1, micro_batch)

    def exchange(self, send: Message | None, receive: Message | None, *, is_blocking: bool) -> None:
        if send is not None or receive is not None:
            sends, receives = (() if message is None else (message,) for message in (send, receive))
            self.program.append(Exchange(sends, receives, is_blocking))

    def _warm_up(self) -> None:
        if not self.is_first:
            self.exchange(None, (False, self.rank - 1, 0), is_blocking=True)
        for k in range(self.num_warmup):
            micro_batch, v = self.call(k, True)
            self.program.append(Compute(True, v, micro_batch))
            receive = None if k == len(self.table) - 1 else self.awaited(k, True)
            self.exchange(self.sent(k, True), receive, is_blocking=True)
        if not self.is_all_warmup and not self.is_last:
            first = (True, (self.kind.vp - 1) * self.kind.pp + self.rank, 0)
            self.exchange(None, first, is_blocking=False)
            self.receives[True].append(first)

    def _steady(self) -> None:
        num_steady = len(self.table) - self.num_warmup
        for k in range(num_steady):
            is_final = k == num_steady - 1
            self._overlapped_call(k + self.num_warmup, True, receives=not is_final)
            self._overlapped_call(k, False, receives=True)

    def _overlapped_call(self, k: int, is_forward: bool, *, receives: bool) -> None:
        """Waits for the input, computes, posts output and next input, and waits for the previous send."""
        is_gradient = not is_forward
        micro_batch, v = self.call(k, is_forward)
        chunk = v * self.kind.pp + self.rank
        starts_pipeline = chunk == 0 if is_forward else chunk == self.kind.pp * self.kind.vp - 1
        if not starts_pipeline and self.receives[is_gradient]:
            self.program.append(Wait(self.receives[is_gradient].pop(0)))
        self.program.append(Compute(is_forward, v, micro_batch))
        send = self.sent(k, is_forward)
        receive = self.awaited(k, is_forward) if receives else None
        self.exchange(send, receive, is_blocking=False)
        if receive is not None:
            self.receives[is_gradient].append(receive)
        if (earlier := self.last_send[is_gradient]) is not None:
            self.program.append(Wait(earlier))
        self.last_send[is_gradient] = send
        if is_forward and send is not None and self.kind.sends_block:
            self.program.append(Wait(send))
            self.last_send[is_gradient] = None

    def _cool_down(self) -> None:
        total = len(self.table)
        if self.is_all_warmup and not self.is_last:
            self.exchange(None, (True, (self.kind.vp - 1) * self.kind.pp + self.rank, 0), is_blocking=True)
        for k in range(total - self.num_warmup, total):
            micro_batch, v = self.call(k, False)
            starts_pipeline = self.is_last and v == self.kind.vp - 1
            if not starts_pipeline and k != 0 and self.receives[True]:
                self.program.append(Wait(self.receives[True].pop(0)))
            self.program.append(Compute(False, v, micro_batch))
            receive = None if k == total - 1 else self.awaited(k, False)
            self.exchange(self.sent(k, False), receive, is_blocking=True)
        if (earlier := self.last_send[True]) is not None:
            self.program.append(Wait(earlier))
