"""Megatron-Core's collectives over gradients and weights, without the copies of a rank that is alone in its group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

_NAMES = ("dist_all_gather_func", "dist_reduce_scatter_func")
_ORIGINALS = {name: getattr(param_and_grad_buffer, name) for name in _NAMES}


def install() -> None:
    """Leaves out all-gathers and reduce-scatters of one rank with itself, which would copy the buffer three times."""
    for name, original in _ORIGINALS.items():
        setattr(param_and_grad_buffer, name, _unless_alone(original))


def uninstall() -> None:
    """Undoes `install`."""
    for name, original in _ORIGINALS.items():
        setattr(param_and_grad_buffer, name, original)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(output: Tensor, source: Tensor, *, group: Any, **options: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == source.data_ptr() and output.shape == source.shape:
            return None  # the sum and the mean over one rank are in place already
        return collective(output, source, group=group, **options)

    return call
