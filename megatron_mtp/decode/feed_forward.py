"""Feed-forward blocks: dense, and mixture of experts for a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.decode.attention import join
from megatron_mtp.decode.linear import Linear
from megatron_mtp.decode.tensor_parallel import TensorParallel


def activation(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The function from the first projection's output, [n, 2 * width] ([gate, up]) or [n, width], to [n, width]."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "relu": F.relu,
        "squared_relu": lambda x: F.relu(x).square_(),
    }
    act = functions[model.activation_func]
    if not model.gated_linear_unit:
        return act

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return act(gate).mul_(up)

    return gated


@dataclass(frozen=True, slots=True)
class Dense:
    """down(act(up(x))), the width sharded over tp."""

    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    tp: TensorParallel

    def local(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, [n, h]."""
        return self.down(self.act(self.up(x)))

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the block of x, both [n, h]."""
        return join(self.down, self.act(self.up(x)), residual, self.tp)


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts and the shared one. Every rank has every expert, its width sharded over tp. No token is dropped.

    Args:
        router: h -> experts, [n, E] fp32 or fp64.
        choose: logits [n, E] -> ids [n, k] of the chosen experts and their weights [n, k].
        gate: [h, 1], the shared expert's gate, or None.
    """

    router: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    experts: list[Dense]
    shared: Dense | None
    gate: Tensor | None
    tp: TensorParallel

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the block of x, both [n, h]."""
        ids, weights = self.choose(self.router(x))
        weights = weights.to(x.dtype)
        total = torch.zeros_like(x)
        if x.shape[0] == 1:
            for slot, expert in enumerate(ids[0].tolist()):
                total += self.experts[expert].local(x) * weights[0, slot]
        else:
            for expert in ids.unique().tolist():
                tokens, slots = (ids == expert).nonzero(as_tuple=True)
                total.index_add_(0, tokens, self.experts[expert].local(x[tokens]) * weights[tokens, slots, None])
        if self.shared is not None:
            shared = self.shared.local(x)
            total += shared if self.gate is None else shared * torch.sigmoid(x @ self.gate)
        return residual + self.tp.reduce(total)


def router(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x [n, h] -> logits [n, E] in `dtype`."""
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


def chooser(model: ModelConfig, expert_bias: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The routing rule of a model; see ModelConfig.moe_router_*."""
    topk, scaling = model.moe_router_topk, model.moe_router_topk_scaling_factor or 1.0
    pick = partial(_topk, model=model)

    def softmax_after(logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = pick(logits)
        return ids, torch.softmax(logits.gather(1, ids), dim=-1) * scaling

    def softmax_before(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(logits, dim=-1)
        ids = pick(scores)
        return ids, scores.gather(1, ids) * scaling

    def sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(logits)
        ids = pick(scores if expert_bias is None else scores + expert_bias)
        weights = scores.gather(1, ids)
        if topk > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * scaling

    if model.moe_router_score_function == "sigmoid":
        return sigmoid
    return softmax_before if model.moe_router_pre_softmax else softmax_after


def _topk(scores: Tensor, model: ModelConfig) -> Tensor:
    """[n, E] -> ids [n, k], of the best groups only where groups limit the choice.

    A group's score is the sum of its best topk / group_topk experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    if model.moe_router_num_groups:
        group_topk = filled(model.moe_router_group_topk)
        grouped = scores.view(scores.shape[0], model.moe_router_num_groups, -1)
        best = grouped.topk(model.moe_router_topk // group_topk, dim=-1).values.sum(-1)
        open_groups = torch.zeros_like(best, dtype=torch.bool)
        open_groups.scatter_(1, best.topk(group_topk, dim=-1).indices, True)
        scores = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
    return scores.topk(model.moe_router_topk, dim=-1).indices
