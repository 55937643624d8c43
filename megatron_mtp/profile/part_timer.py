"""Times the parts of a model while it trains: each call of a chunk is cut into segments at the limits of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mtp.model.mtp import MTPModel

Segments = dict[str, float]
"""Part -> milliseconds in one call. "other" is the time between parts."""


class Clock:
    """Stamps moments of a device's work: wall time on a CPU, events of the current stream on a GPU."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def now(self) -> Any:
        """A stamp that `ms` understands."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Time between two stamps; waits for the device if needed."""
        if not self._is_cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)


class PartTimer:
    """Cuts the forward and backward calls of one chunk into parts, with hooks on modules and their inputs' gradients.

    A segment of a forward call ends where a part begins ("other") or ends (that part). A segment of a backward call
    ends when the gradient of a part's input is ready, and belongs to that part, recomputation included. The rest of the
    call belongs to the embedding.

    Args:
        chunk: a complete model, embedding to loss.
        kinds: the name of each decoder layer's segments.

    Attributes:
        forward, backward: the segments of every call so far.
    """

    def __init__(self, chunk: MTPModel, kinds: list[str], clock: Clock):
        self.forward: list[Segments] = []
        self.backward: list[Segments] = []
        self._clock = clock
        self._marks: list[tuple[str, Any]] = []
        self._is_forward = False
        self._inside: nn.Module | None = None
        parts = [(chunk.embedding, "embedding"), (chunk.decoder.final_layernorm, "final_norm")]
        parts += list(zip(chunk.decoder.layers, kinds, strict=True))
        parts += [(layer, "mtp") for layer in (chunk.mtp.layers if chunk.mtp_process else [])]
        self._handles: list[Any] = []
        for module, name in parts:
            self._handles.append(module.register_forward_pre_hook(self._enters(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaves(name)))

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """One call of the chunk: "forward" or "backward"; see `mcore.schedules.watch_calls`."""
        self._is_forward = name == "forward"
        self._marks = [("", self._clock.now())]
        yield
        # After the heads comes the loss function; after the first layer's backward pass the embedding's.
        self._mark("head" if self._is_forward else "embedding")
        (self.forward if self._is_forward else self.backward).append(self._segments())
        self._is_forward = False

    def watch_heads(self, heads: Callable[..., Any]) -> Callable[..., Any]:
        """The heads, timed as "head"."""

        def call(states: Tensor, *args: Any) -> Any:
            self._mark("other")
            self._watch_gradient(states, "head")
            return heads(states, *args)

        return call

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._clock.now()))

    def _segments(self) -> Segments:
        found: Segments = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + self._clock.ms(start, end)
        return found

    def _enters(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A recomputed part is called again in the backward pass; an MTP layer calls the embedding itself.
            if not self._is_forward or self._inside is not None:
                return
            self._inside = module
            self._mark("other")
            if name != "embedding":
                self._watch_gradient(kwargs.get("hidden_states", args[0] if args else None), name)

        return hook

    def _leaves(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self._inside is module and self._is_forward:
                self._inside = None
                self._mark(name)

        return hook

    def _watch_gradient(self, tensor: Tensor | None, name: str) -> None:
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: self._mark(name))
