"""The cache slots of one pass's tokens, and which slots each token sees.

A pass runs q tokens of each of b rows. Row r writes its keys and values to the slots starts[r] .. starts[r] + q - 1 of
static caches, and a token sees the slots up to its own. Slots after a row's end hold leftovers of rejected drafts or
padding: nothing reads them and the next pass overwrites them, so rolling back only means a smaller start.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class MaskTable:
    """Additive masks of consecutive tokens, as views of one buffer per shape.

    A pass of q tokens from slot `start` needs q rows over start + q keys, with a triangle in the last q columns. The
    buffer spans the complete context, and its last start + q columns are the mask.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity, self.dtype, self.device = capacity, dtype, device
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def view(self, q: int, heads: int, stop: int) -> Tensor:
        """[q * heads, stop]: one row per token and head, heads innermost."""
        buffer = self._buffers.get((q, heads))
        if buffer is None:
            width = self.capacity + q
            visible = torch.ones(q, width, dtype=torch.bool, device=self.device).tril(width - q)
            buffer = additive(visible, self.dtype).repeat_interleave(heads, dim=0)
            if q <= 32:  # a longer one is big and used once
                self._buffers[q, heads] = buffer
        return buffer[:, buffer.shape[1] - stop :]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """True -> 0, False -> -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


class Span:
    """The slots of one pass.

    Args:
        starts: first slot of each row.
        q: tokens of each row.
        masks: masks of the same context.
        cis: [positions, width / 2] complex, rotations of all positions; None: no positions.
    """

    def __init__(self, starts: list[int], q: int, masks: MaskTable, cis: Tensor | None):
        self.b, self.q, self.starts = len(starts), q, starts
        self.start: int | None = starts[0] if all(start == starts[0] for start in starts) else None
        self.stop = max(starts) + q
        self._masks, self._cis = masks, cis

    @cached_property
    def positions(self) -> Tensor:
        """[b, q] positions of the tokens, which are their slots. A tree overrides it: positions may repeat."""
        device = self._masks.device
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(self.q, device=device)

    @cached_property
    def rotation(self) -> Tensor | None:
        """[b * q, 1, width / 2] complex, one row for each token."""
        if self._cis is None:
            return None
        if self.b == 1:
            return self._cis[self.starts[0] : self.stop].unsqueeze(1)
        return self._cis[self.positions.flatten()].unsqueeze(1)

    def mask(self, heads: int) -> Tensor | None:
        """The additive mask for q * heads queries over `stop` keys; None: each query sees every key."""
        if self.start is not None:
            return None if self.q == 1 else self._masks.view(self.q, heads, self.stop)
        return self._ragged.repeat_interleave(heads, dim=2) if heads > 1 else self._ragged

    @cached_property
    def _ragged(self) -> Tensor:
        slots = torch.arange(self.stop, device=self._masks.device)
        return additive(slots <= self.positions[..., None], self._masks.dtype)[:, None]  # [b, 1, q, stop]

    @cached_property
    def rows(self) -> Tensor:
        """[b, 1] row numbers, for indexing."""
        return torch.arange(self.b, device=self._masks.device)[:, None]

    def write(self, cache: Tensor, new: Tensor) -> None:
        """Writes `new` [b * q, groups, width] into `cache` [b, groups, slots, width]."""
        new = new.view(self.b, self.q, *new.shape[1:])
        if self.start is not None:
            cache[:, :, self.start : self.stop] = new.transpose(1, 2)
        else:
            cache[self.rows, :, self.positions] = new


class TreeSpan(Span):
    """The nodes of a draft tree, after the accepted tokens. One row only.

    Node j is in slot start + j, has the position start + its depth, and sees the accepted slots, its ancestors and
    itself.

    Args:
        start: slot of the root.
        parents: parent of each node, -1 for the root, which comes first; parents come before children.
        masks, cis: as Span.
    """

    def __init__(self, start: int, parents: list[int], masks: MaskTable, cis: Tensor | None):
        super().__init__([start], len(parents), masks, cis)
        self.parents = parents
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        self.depths = depths

    @cached_property
    def positions(self) -> Tensor:
        return torch.tensor([[self.starts[0] + depth for depth in self.depths]], device=self._masks.device)

    @cached_property
    def rotation(self) -> Tensor | None:
        return None if self._cis is None else self._cis[self.positions[0]].unsqueeze(1)

    @cached_property
    def _tree(self) -> Tensor:
        visible = torch.ones(self.q, self.stop, dtype=torch.bool)
        visible[:, self.starts[0] :] = False
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] = visible[parent]
            visible[node, self.starts[0] + node] = True
        return additive(visible.to(self._masks.device), self._masks.dtype)

    def mask(self, heads: int) -> Tensor | None:
        return self._tree.repeat_interleave(heads, dim=0)
