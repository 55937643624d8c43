"""Norms of the gradient at the trunk's output, apart for what comes from the main head and from the MTP layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TrunkGradient:
    """Sums the squares of both parts of the gradient at the trunk's output, on the stage where the two branches part.

    The trunk's output is the hidden state that depth 1 reads; the main head reads it too, through the final norm where
    `mtp_hidden_source` is `pre_final_norm`. Everything that flows back through the MTP layers counts as theirs, their
    router losses included. With `mtp_detach_heads` that is nothing.

    Attributes:
        is_on: whether the passes of this step are measured. Switched before a step; other steps cost nothing.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._squares: list[Tensor | None] = [None, None]

    def begin(self, *, is_on: bool) -> None:
        """Forgets what was summed, and measures the next step or not."""
        self.is_on, self._squares = is_on, [None, None]

    def branches(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state [s, b, h] as the main head and as the MTP layers are to read it."""
        if not (self.is_on and torch.is_grad_enabled() and hidden.requires_grad):
            return hidden, hidden
        main, mtp = hidden.view_as(hidden), hidden.view_as(hidden)
        main.register_hook(self._adder(0))
        mtp.register_hook(self._adder(1))
        return main, mtp

    @property
    def squares(self) -> tuple[Tensor | None, Tensor | None]:
        """Sums of squares [] fp32 of the main head's and of the MTP layers' part over this rank's micro-batches; None:
        no such gradient arrived here."""
        main, mtp = self._squares
        return main, mtp

    def _adder(self, part: int) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square()
            old = self._squares[part]
            self._squares[part] = square if old is None else old + square

        return add
