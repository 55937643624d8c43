"""The legal ways to cut a model into pipeline chunks, and the time of every chunk.

A split is the number of decoder layers of each chunk in execution order, and whether the MTP layers have a chunk before
the loss's. The embedding is on the first chunk, the loss on the last. Every legal layout is such a split
(config/layout_text.py), so this is also where the chunks of a given layout get their times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.part_costs import ZERO, PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.simulate import Work


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """Decoder layers of each chunk in execution order; `is_standalone`: the MTP layers have the last chunk but one."""

    counts: tuple[int, ...]
    is_standalone: bool = False

    @classmethod
    def of(cls, layout: PipelineLayout) -> Split:
        """The split that a legal layout is.

        Example: "Et|ttt|mm|L" -> Split((1, 3, 0, 0), is_standalone=True).
        """
        return cls(tuple(chunk.count("t") for chunk in layout.in_order), layout.has_standalone_mtp)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First layer of each chunk, and the last one + 1."""
        return list(pairwise(accumulate(self.counts, initial=0)))


@dataclass(frozen=True, kw_only=True)
class SplitProblem:
    """What is to be cut into which chunks, and what each part costs.

    Args:
        layers: time of every decoder layer for one micro-batch.
        mtp: time of all depths together, without their passes through the head.
        loss: output head and loss of all depths.
        overhead: time of each call of a chunk in addition to its parts.
        final_norm: sits with the last decoder layer; without MTP with the loss.
        message_ms: time of one hidden state between neighbouring chunks.
        wide_message_ms: time of the 1+D hidden states from a standalone MTP chunk to the loss.
        shapes_ms: time of the message about shapes that precedes each message if the MTP layers stand alone.
        mtp_needs_layer: the MTP layers must share a chunk with the last decoder layer (mtp_hidden_source=
            pre_final_norm).
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

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of all ranks."""
        return self.kind.pp * self.kind.vp

    def fewest(self, chunk: int, is_standalone: bool) -> int:
        """Fewest decoder layers of a chunk: no chunk is empty."""
        last = self.num_chunks - 1
        if chunk == last - is_standalone and self.num_depths:
            return int(self.mtp_needs_layer)
        return 0 if chunk in (0, last) else 1

    def most(self, chunk: int, is_standalone: bool) -> int:
        """Most decoder layers of a chunk: none next to the loss if the MTP layers come before it."""
        return 0 if is_standalone and chunk == self.num_chunks - 1 else len(self.layers)

    @cached_property
    def fewest_layers(self) -> dict[bool, list[int]]:
        """`fewest` of every chunk, by is_standalone."""
        return {alone: [self.fewest(c, alone) for c in range(self.num_chunks)] for alone in (False, True)}

    @cached_property
    def variants(self) -> list[bool]:
        """Values of Split.is_standalone for which a legal split exists."""
        # A standalone MTP chunk is neither on rank 0 nor on the loss's rank.
        possible = [False, True] if self.num_depths and self.kind.pp > 2 else [False]
        return [alone for alone in possible if len(self.layers) >= sum(self.fewest_layers[alone])]

    def is_legal(self, split: Split) -> bool:
        """Whether no chunk holds too few or too many layers."""
        return all(
            self.fewest(chunk, split.is_standalone) <= count <= self.most(chunk, split.is_standalone)
            for chunk, count in enumerate(split.counts)
        )

    def num_legal(self, limit: int) -> int:
        """Number of legal splits, at most `limit`."""
        total = 0
        for is_standalone in self.variants:
            ways = [1] + [0] * len(self.layers)  # ways[n]: of filling the chunks so far with n layers
            for chunk in range(self.num_chunks):
                fewest, most = self.fewest(chunk, is_standalone), self.most(chunk, is_standalone)
                sums = [0, *accumulate(ways)]
                ways = [
                    min(limit, sums[max(0, n - fewest + 1)] - sums[max(0, n - most)])
                    for n in range(len(self.layers) + 1)
                ]
            total += ways[-1]
        return min(limit, total)

    @cached_property
    def layer_sums(self) -> tuple[list[float], list[float]]:
        """Forward and backward time of the first n layers."""
        sums = list(accumulate(self.layers, initial=ZERO))
        return [time.forward_ms for time in sums], [time.backward_ms for time in sums]

    def _extra(self, chunk: int, is_standalone: bool) -> PartTime:
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
    def extras(self) -> dict[bool, list[PartTime]]:
        """What each chunk holds in addition to decoder layers and, with MTP, the final norm; by is_standalone."""
        return {alone: [self._extra(c, alone) for c in range(self.num_chunks)] for alone in (False, True)}

    def chunk_time(self, chunk: int, start: int, stop: int, is_standalone: bool) -> tuple[float, float]:
        """Forward and backward time of one micro-batch in a chunk that holds the layers start..stop-1, in ms."""
        (forward, backward), extra = self.layer_sums, self.extras[is_standalone][chunk]
        if self.num_depths and start < stop == len(self.layers):
            extra = extra + self.final_norm
        return forward[stop] - forward[start] + extra.forward_ms, backward[stop] - backward[start] + extra.backward_ms

    def chunk_totals(self, split: Split) -> list[float]:
        """Forward and backward time together of one micro-batch in every chunk, in execution order, in ms."""
        return [sum(self.chunk_time(chunk, *span, split.is_standalone)) for chunk, span in enumerate(split.spans)]

    def work(self, split: Split) -> Work:
        """What the simulation of a step needs."""
        pp, alone = self.kind.pp, split.is_standalone
        times = [PartTime(*self.chunk_time(chunk, *span, alone)) for chunk, span in enumerate(split.spans)]
        messages = [self.message_ms] * (self.num_chunks - 1)
        if split.is_standalone:
            messages[-1] = self.wide_message_ms
        return Work(
            chunks=tuple(tuple(times[rank::pp]) for rank in range(pp)),
            message_ms=tuple(messages),
            shapes_ms=self.shapes_ms if split.is_standalone else None,
        )

    def symbols(self, chunk: int, count: int, is_standalone: bool) -> str:
        """A chunk with `count` decoder layers as a string of E, t, m and L."""
        last = self.num_chunks - 1
        depths = self.num_depths if chunk == last - is_standalone else 0
        return "E" * (chunk == 0) + "t" * count + "m" * depths + "L" * (chunk == last)

    def layout(self, split: Split) -> PipelineLayout:
        """A split as a layout."""
        flat = [self.symbols(chunk, count, split.is_standalone) for chunk, count in enumerate(split.counts)]
        return PipelineLayout.of_chunks(flat, self.kind.pp, self.kind.vp)
