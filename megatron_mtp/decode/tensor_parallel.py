"""Communication between the ranks of a tensor-parallel group while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Heads, feed-forward widths and vocabulary rows are sharded over `group`; hidden states are replicated.

    Args:
        group: None: one rank.
    """

    group: ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Joins the ranks' shards of `x` along `dim`."""
        if self.size == 1:
            return x
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, x.contiguous(), group=self.group)
        return torch.cat(shards, dim=dim)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, for decisions that depend on a clock."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]
