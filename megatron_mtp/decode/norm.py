"""Norms with few kernel launches. The weight of an RMSNorm is multiplied into the next projections beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]
"""[..., width] -> the same shape."""


class RMSScale:
    """x / sqrt(mean(x^2) + eps), without a weight.

    Mean and epsilon are one product with a column of 1 / width: four launches instead of seven (4 us against 15 on a
    CPU).
    """

    __slots__ = ("column", "eps", "width")

    def __init__(self, width: int, eps: float, device: torch.device):
        self.width = width
        self.column = torch.full((width, 1), 1.0 / width, device=device)
        self.eps = torch.full((1, 1), eps, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self(x.float()).to(x.dtype)
        flat = (x * x).view(-1, self.width)
        scale = torch.addmm(self.eps, flat, self.column).rsqrt_()
        return x * (scale if x.dim() == 2 else scale.view(*x.shape[:-1], 1))


class LayerNorm:
    """LayerNorm with weight and bias."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class WeightedRMS:
    """RMSNorm with its weight, for results that are read as they are."""

    __slots__ = ("scale", "weight")

    def __init__(self, scale: Norm, weight: Tensor):
        self.scale, self.weight = scale, weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale(x).mul_(self.weight)
