"""RMSNorm and LayerNorm that work under sequence parallelism, with fp32 statistics.

Megatron-Core's wrapper around torch's norms refuses sequence parallelism and zero-centred weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchNorm(torch.nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight. LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Statistics are over the last dimension, in fp32 where the input is bf16 or fp16. With
    `config.layernorm_zero_centered_gamma` the parameter holds weight - 1.

    Args:
        config: chooses the norm (`normalization`), the parameter's dtype, and whether the weight is marked so that its
            gradient is summed over tensor-parallel ranks that each see a part of the sequence.
        hidden_size: width of the last dimension.
        eps: added to the mean square or the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object):
        super().__init__()
        assert config.normalization in ("RMSNorm", "LayerNorm"), config.normalization
        self.hidden_size, self.eps = hidden_size, eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

        def parameter(value: float) -> torch.nn.Parameter:
            weight = torch.full((hidden_size,), value, dtype=config.params_dtype, device=device)
            param: Any = torch.nn.Parameter(weight)
            param.sequence_parallel = config.sequence_parallel
            return param

        self.weight = parameter(0.0 if self.zero_centered else 1.0)
        if config.normalization == "LayerNorm":
            self.bias = parameter(0.0)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [..., hidden_size]; same shape and dtype."""
        if x.dtype in (torch.bfloat16, torch.float16) and (self.zero_centered or x.device.type == "cpu"):
            # torch's CPU kernel sums LayerNorm's weight gradient in bf16: 2 % off over six tokens. And 1 + weight would
            # be rounded to 8 bits in bf16, which undoes the purpose of storing the difference.
            weight = self.weight.float() + 1 if self.zero_centered else self.weight.float()
            return self._norm(x.float(), weight, self._bias(torch.float32)).to(x.dtype)
        weight = self.weight + 1 if self.zero_centered else self.weight
        return self._norm(x, weight.to(x.dtype), self._bias(x.dtype))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = (self.hidden_size,)
        if bias is None:
            return F.rms_norm(x, shape, weight, self.eps)
        return F.layer_norm(x, shape, weight, bias, self.eps)
