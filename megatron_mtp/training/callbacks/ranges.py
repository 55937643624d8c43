"""Named ranges in a profiler trace: stage, chunk and micro-batch of each call, depth of each MTP layer, phase.

Ranges of a rank of stage 1, as a trace shows them:

    stage 1 chunk 0 forward, micro-batch 2      a call of a chunk, with the loss function on the last stage
    depth 1 forward                             an MTP layer within it
    heads                                       logits and losses of every depth
    stage 1 chunk 0 backward, micro-batch 0
    depth 1 backward                            from the gradient of its output to that of its input
    depth 1 recompute                           its forward pass again, within the backward pass
    data, forward and backward, update          parts of a step; they are in the code of the loop
    stage 1 evaluation                          a call of a chunk without a backward pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from megatron_mtp.mcore.schedules import watch_calls
from megatron_mtp.model.mtp import MTPLayer
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.parallel.planner.schedule import Compute, ScheduleKind, compute_order
from megatron_mtp.training.setup import Run


class Ranges:
    """Marks what one rank computes, until `close`.

    Args:
        run: ready to train; hooks are set on its MTP layers.
    """

    def __init__(self, run: Run):
        layout = run.resolved.layout
        kind = ScheduleKind(pp=layout.pp, vp=layout.vp, num_microbatches=run.resolved.num_microbatches)
        self._stage = run.groups.pp.rank()
        self._order: list[Compute] = compute_order(kind, self._stage)
        self._calls = 0
        self._is_backward = False
        self._depth_of_call = 0
        self._open: dict[int, ExitStack] = {}
        self._exits = ExitStack()
        self._exits.enter_context(watch_calls(self._around))
        for chunk in run.engine.chunks:
            model: Any = unwrap(chunk)
            for layer in model.mtp.layers if model.mtp_process else ():
                for handle in self._hooks(layer):
                    self._exits.callback(handle.remove)

    def close(self) -> None:
        """Takes the hooks away; may be called twice."""
        self._exits.close()

    @contextmanager
    def _around(self, name: str) -> Iterator[None]:
        """One call of a chunk by the schedule."""
        if not torch.is_grad_enabled():
            title = f"stage {self._stage} evaluation"
        else:
            # Every step makes the same calls, also one that is rolled back.
            call = self._order[self._calls % len(self._order)]
            self._calls += 1
            title = f"stage {self._stage} chunk {call.vp_rank} {name}, micro-batch {call.micro_batch}"
        self._is_backward, self._depth_of_call = name == "backward", 0
        with record_function(title):
            yield
            self._close_depths()
        self._is_backward = False

    def _hooks(self, layer: MTPLayer) -> list[RemovableHandle]:
        entered: list[ExitStack] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Depths of one call run in order; a layer that all of them share is entered once for each.
            self._depth_of_call += 1
            depth = self._depth_of_call
            entered.append(_entered(f"depth {depth} forward"))
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if isinstance(hidden, Tensor) and hidden.requires_grad and hidden.grad_fn is not None:
                _on_gradient(hidden, partial(self._close_depths, depth))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            depth = self._depth_of_call
            entered.pop().close()
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                _on_gradient(hidden, partial(self._open_depth, depth))

        return [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
            *self._recomputation(layer.mtp_model_layer),
        ]

    def _recomputation(self, inner: nn.Module) -> list[RemovableHandle]:
        """A depth that is recomputed calls its transformer layer again, and not itself."""
        entered: list[ExitStack] = []

        def before(*_: Any) -> None:
            if self._is_backward:
                entered.append(_entered(f"depth {next(iter(self._open), 0)} recompute"))

        def after(*_: Any) -> None:
            if entered:
                entered.pop().close()

        return [inner.register_forward_pre_hook(before), inner.register_forward_hook(after)]

    def _open_depth(self, depth: int) -> None:
        self._close_depths()
        self._open[depth] = _entered(f"depth {depth} backward")

    def _close_depths(self, depth: int | None = None) -> None:
        """Ends the backward range of a depth, or of all that are open."""
        for one in [depth] if depth is not None else list(self._open):
            if one in self._open:
                self._open.pop(one).close()


def _on_gradient(tensor: Any, act: Callable[[], None]) -> None:
    """Calls `act` when the gradient of a tensor is computed. Any: torch's `register_hook` has no annotations."""
    tensor.register_hook(lambda _: act())


def _entered(name: str) -> ExitStack:
    """A range that has begun; `close` ends it."""
    stack = ExitStack()
    stack.enter_context(record_function(name))
    return stack
