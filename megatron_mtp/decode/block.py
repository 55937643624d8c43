"""A transformer layer, and the MTP layer around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtp.decode.attention import Cache, GroupedAttention, LatentAttention
from megatron_mtp.decode.feed_forward import Dense, Experts
from megatron_mtp.decode.linear import Linear
from megatron_mtp.decode.norm import Norm
from megatron_mtp.decode.span import Span


@dataclass(frozen=True, slots=True)
class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    attention_norm: Norm
    attention: GroupedAttention | LatentAttention
    feed_forward_norm: Norm
    feed_forward: Dense | Experts

    def __call__(self, x: Tensor, span: Span, cache: Cache) -> Tensor:
        """[b * q, h] -> [b * q, h]; writes keys and values to the slots of `span`."""
        x = self.attention(self.attention_norm(x), x, span, cache)
        return self.feed_forward(self.feed_forward_norm(x), x)


@dataclass(frozen=True, slots=True)
class InputProjection:
    """M [enorm(embedding); hnorm(hidden)], the input of a sequential MTP layer's block."""

    enorm: Norm
    hnorm: Norm
    projection: Linear

    def normed(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """embedded, hidden: [n, h] -> what the projection reads, [n, 2h]."""
        return torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)

    def __call__(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """embedded, hidden: [n, h] -> [n, h]."""
        return self.projection(self.normed(embedded, hidden))


@dataclass(frozen=True, slots=True)
class Depth:
    """One MTP layer: h_k = norm(block(M [enorm(Emb(t[i+k])); hnorm(h_{k-1})])). A parallel head has no M and no token.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2; Gloeckle et al. 2024, arXiv 2404.19737, section 2.
    """

    input: InputProjection | None
    block: Block
    final_norm: Norm

    def __call__(self, hidden: Tensor, embedded: Tensor | None, span: Span, cache: Cache) -> Tensor:
        """hidden, embedded: [b * q, h] -> [b * q, h] for the head and the next depth."""
        if self.input is not None:
            assert embedded is not None
            hidden = self.input(embedded, hidden)
        return self.final_norm(self.block(hidden, span, cache))
