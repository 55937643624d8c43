"""Memory of a checkpoint's snapshot that is kept from one save to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptBuffers:
    """Gives out tensors on the CPU in the order of the first save. A page of new memory costs more than its copy."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._taken = 0

    def start(self) -> None:
        """A new save begins: everything that was given out may be overwritten."""
        self._taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, valid until the next `start`: zeros, or what the save before left in it."""
        index, self._taken = self._taken, self._taken + 1
        if index < len(self._kept) and (self._kept[index].shape, self._kept[index].dtype) == (torch.Size(shape), dtype):
            return self._kept[index]
        made = torch.zeros(tuple(shape), dtype=dtype)
        self._kept[index:] = [made]  # what follows was for another order
        return made
