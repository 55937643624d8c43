"""Where bad numbers came from: which rank, which samples, which parameters.

When a step is known to be bad, its gradient has already been summed over ranks, and every rank has it. So each rank
notes which of its own gradients are not finite just before they are reduced. The notes are read only if a step is bad.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mtp.config.depths import loss_names
from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.objective.metrics import BatchMetrics

SHOWN = 3
BEGUN, DONE, REDUCED = range(3)
"""Moments of a step: before its first pass, this rank's own gradients are complete, they are reduced."""


class GradientWatch:
    """Notes which of a rank's own gradients are not finite, and how long the rank took, after its backward pass.

    Args:
        chunks: model chunks, wrapped for data parallelism.
        is_overlapped: gradients are reduced during the backward pass, so a rank's own are never complete.
    """

    def __init__(self, chunks: list[nn.Module], is_overlapped: bool):
        self._parameters: list[tuple[str, Any]] = [  # parameters have Megatron-Core's `main_grad`
            (name, parameter)
            for chunk in chunks
            for name, parameter in unwrap(chunk).named_parameters()
            if parameter.requires_grad
        ]
        self.is_overlapped = is_overlapped
        self.readers: list[Callable[[], None]] = []
        """Called in each step when the gradients are reduced, before they are scaled, clipped or applied."""
        self._norms: Tensor | None = None
        self._clocks = [0.0, 0.0, 0.0]
        self._events: list[torch.cuda.Event] = []
        if next(chunks[0].parameters()).device.type == "cuda":
            # torch's Event has no types.
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]

    @property
    def own_s(self) -> float:
        """Seconds from the start of the last step until this rank had its gradients, waits for other stages included.

        On a GPU it is device time; read it only after the step's losses.
        """
        return self._between(BEGUN, DONE)

    def times_ms(self) -> dict[str, float]:
        """Times of the last step on this rank in ms, read as `own_s`.

        `perf/forward_backward_ms` is that of `own_s`, `perf/reduction_ms` that of bringing the gradients of all ranks
        together. With `overlap_grad_reduce` most of that happens in the first one.
        """
        spans = {"perf/forward_backward_ms": (BEGUN, DONE), "perf/reduction_ms": (DONE, REDUCED)}
        return {name: self._between(*span) * 1e3 for name, span in spans.items()}

    def _between(self, first: int, last: int) -> float:
        if self._events:
            return float(self._events[first].elapsed_time(self._events[last])) / 1e3
        return self._clocks[last] - self._clocks[first]

    def _mark(self, moment: int) -> None:
        self._clocks[moment] = time.perf_counter()
        if self._events:
            self._events[moment].record()

    def begin(self) -> None:
        """Starts the notes of a step."""
        self._norms = None
        self._mark(BEGUN)

    def around(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Wraps Megatron-Core's hook that reduces gradients."""

        def noted(*arguments: Any, **options: Any) -> None:
            self._mark(DONE)
            if not self.is_overlapped:
                self._note()
            finalize(*arguments, **options)
            self._mark(REDUCED)
            for read in self.readers:
                read()

        return noted

    def bad_parameters(self) -> list[str]:
        """Names of the parameters whose gradient on this rank is not finite."""
        if self._norms is None:
            return []
        bad = (~torch.isfinite(self._norms)).nonzero().flatten().tolist()
        return [self._parameters[index][0] for index in bad]

    @torch.no_grad()
    def _note(self) -> None:
        # The host does not wait for a GPU here. On a CPU the 2-norm takes a tenth of the time of the maximum norm.
        gradients = [parameter.main_grad for _, parameter in self._parameters]
        self._norms = torch.stack(torch._foreach_norm(gradients)) if gradients else None


@dataclass(frozen=True, slots=True)
class _Notes:
    """What one rank knows about a bad step."""

    rank: int
    where: str
    losses: list[str]
    parameters: list[str]
    samples: list[int]


def locate(groups: ProcessGroupCollection, watch: GradientWatch, batch: GlobalBatch, metrics: BatchMetrics) -> str:
    """Says where a step that is not finite came from. A collective; every rank gets the text.

    Args:
        groups: process groups of the layout.
        watch: of this rank's gradients in the step.
        batch, metrics: of the step.

    Returns:
        Such as `mtp_1 loss on rank 1 (dp 1, host a) in samples 4, 5`.
    """
    bad = (~torch.isfinite(metrics.local_sums)).tolist()
    places = {"dp": groups.dp, "tp": groups.tp, "pp": groups.pp, "cp": groups.cp}
    coordinates = [f"{name} {group.rank()}" for name, group in places.items() if group.size() > 1]
    notes = _Notes(
        rank=dist.get_rank(),
        where=", ".join([*coordinates, f"host {socket.gethostname()}"]),
        losses=[name for name, is_bad in zip(loss_names(len(bad) - 1), bad, strict=True) if is_bad],
        parameters=watch.bad_parameters(),
        samples=np.asarray(batch.sample_ids)[np.asarray(batch.places)].flatten().tolist(),
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, notes)
    return "; ".join(_in_words(everyone, watch.is_overlapped))


def _in_words(everyone: list[_Notes], is_overlapped: bool) -> list[str]:
    """Names the losses, or the gradients if all losses are finite: a bad loss makes every gradient bad."""
    with_losses = [notes for notes in everyone if notes.losses]
    if with_losses:
        return [
            f"{', '.join(n.losses)} on rank {n.rank} ({n.where}) in samples {_some(n.samples)}" for n in with_losses
        ]
    with_gradients = [notes for notes in everyone if notes.parameters]
    if with_gradients:
        return [
            f"all losses are finite; the gradient of {_some(n.parameters)} on rank {n.rank} ({n.where}) is not"
            for n in with_gradients
        ]
    if is_overlapped:
        return ["all losses are finite; set ddp.overlap_grad_reduce = False to see which rank's gradient is not"]
    return ["the losses and gradients of each rank are finite; only a sum over ranks is not"]


def _some(items: list[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:SHOWN])
    return f"{shown} and {len(items) - SHOWN} more" if len(items) > SHOWN else shown
