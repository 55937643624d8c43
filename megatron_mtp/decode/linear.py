"""Matrix products of a few rows with a big weight, in the fastest form for the weight's device.

Decoding multiplies 1 to about 8 rows at a time, so reading the weight dominates. Drafting only pays if a product of K +
1 rows takes about as long as one of a single row. On a CPU in fp32, MKL's product of 2 to 8 rows took 2 to 5 times as
long as that of one row; oneDNN's with a packed weight took the same time for all (docs/decoding.md), and for nearly all
shapes a row's result has the same bits whatever the other rows are.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Smaller weights fit a core's cache, where calling oneDNN (13 us) takes longer than MKL's product (4 us).
PACK_FROM_ELEMENTS = 2**18
# Number of rows that oneDNN packs for. A form packed for one row is slow for more.
PACK_FOR_ROWS = 4


class Linear(Protocol):
    """x [n, in] -> x W^T + bias, [n, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [n, out] + x W^T + bias, in one kernel if possible."""


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest form of a weight [out, in] for its device, dtype and size."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return _Plain(weight, bias)
    if weight.numel() < PACK_FROM_ELEMENTS or not packs():
        return _Small(weight, bias)
    return _Packed(weight, bias)


def packs() -> bool:
    """Whether this build of PyTorch has oneDNN's product with a packed weight."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Plain:
    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).add_(residual)


class _Small:
    __slots__ = ("bias", "transposed")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.transposed, self.bias = weight.t().contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.transposed)
        return torch.addmm(self.bias, x, self.transposed)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        result = torch.addmm(residual, x, self.transposed)
        return result if self.bias is None else result.add_(self.bias)


class _Packed:
    __slots__ = ("add", "bias", "product", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_FOR_ROWS)
        self.bias = bias
        self.product = torch.ops.mkldnn._linear_pointwise.default
        self.add = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.add(x, residual, self.weight, self.bias, "add")
