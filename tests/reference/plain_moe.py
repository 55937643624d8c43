"""Mixture of experts as formulas: every expert runs on every token, and a weight of zero drops what the router did not
choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.plain_config import MoEConfig


@dataclass(kw_only=True)
class RouterRecord:
    """What one router did on one micro-batch."""

    chosen: Tensor
    """[b, s, E] bool, the routing map."""
    balance_sum: Tensor
    """Sequence-wise balancing loss, summed over the b sequences, without its coefficient."""
    z_sum: Tensor
    """Sum over the b * s tokens of logsumexp(logits)^2."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E] int64."""
        return self.chosen.flatten(0, 1).sum(0)


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool of the shape of scores: the `count` largest along the last dimension."""
    threshold_idx = scores.detach().argsort(dim=-1, descending=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, threshold_idx, True)


def choose(scores: Tensor, moe: MoEConfig) -> Tensor:
    """The routing map [..., E]: top-k of all experts, or of the experts of the best groups.

    A group's score is the sum of its best topk / group_topk experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    if moe.num_groups is None:
        return largest(scores, moe.topk)
    in_groups = scores.unflatten(-1, (moe.num_groups, -1))
    group_scores = in_groups.sort(dim=-1, descending=True).values[..., : moe.topk // moe.group_topk].sum(-1)
    open_groups = largest(group_scores, moe.group_topk)[..., None].expand_as(in_groups).flatten(-2)
    return largest(scores.masked_fill(~open_groups, float("-inf")), moe.topk)


def route(logits: Tensor, moe: MoEConfig, expert_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Routing map and weights, both [..., E]; weights are zero where the map is False."""
    closed = float("-inf")
    if moe.score_function == "softmax" and moe.pre_softmax:
        scores = torch.softmax(logits, dim=-1)
        chosen = choose(scores, moe)
        weights = scores * chosen
    elif moe.score_function == "softmax":
        chosen = choose(logits, moe)
        weights = torch.softmax(logits.masked_fill(~chosen, closed), dim=-1)
    else:
        scores = torch.sigmoid(logits)
        chosen = choose(scores if expert_bias is None else scores + expert_bias, moe)
        weights = scores * chosen
        # A single chosen expert keeps its raw score: normalised it would always be 1 and the router would learn
        # nothing.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if moe.topk > 1 else weights
    return chosen, weights * moe.scaling_factor


def sequence_balance(logits: Tensor, moe: MoEConfig) -> Tensor:
    """Sequence-wise balancing loss of each sequence, [b], as Megatron-Core's `seq_aux_loss` defines it.

    For one sequence of s tokens: E / (K s^2) * sum over experts e of (sum_t f_te) (sum_t p_te), where p_t is the
        softmax, or the
    sigmoid scores over their sum, of token t, and f_t marks the K largest of p_t: group limits and the expert bias play
        no part.
    DeepSeek-V3, equations 17-20, has the same form. No gradient flows through f.
    """
    s = logits.shape[1]
    p = torch.softmax(logits, dim=-1)
    if moe.score_function == "sigmoid":
        p = torch.sigmoid(logits)
        p = p / (p.sum(-1, keepdim=True) + 1e-20)
    f = largest(p, moe.topk).to(p.dtype)
    return moe.num_experts / (moe.topk * s * s) * (f.sum(1) * p.sum(1)).sum(-1)


def updated_expert_bias(expert_bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): after a step, up by `rate` where an expert got less than its
    share, down where it got more. `tokens_per_expert` counts the whole global batch, [E]."""
    share = tokens_per_expert.sum() / tokens_per_expert.numel()
    return expert_bias + rate * torch.sign(share - tokens_per_expert).to(expert_bias.dtype)


class MoE(nn.Module):
    """Sum over chosen experts e of weight_e(x) * expert_e(x), plus the shared expert."""

    def __init__(self, moe: MoEConfig, hidden_size: int, bias: bool, make_mlp: Callable[[int, bool], nn.Module]):
        super().__init__()
        self.moe = moe
        self.router = nn.Linear(hidden_size, moe.num_experts, bias=bias)
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.expert_bias else None)
        self.experts = nn.ModuleList(make_mlp(moe.ffn_size, bias) for _ in range(moe.num_experts))
        self.shared = None if moe.shared_ffn_size is None else make_mlp(moe.shared_ffn_size, False)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if moe.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterRecord]:
        logits = self.router(x)  # [b, s, E]
        chosen, weights = route(logits, self.moe, self.expert_bias)
        output = sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        if self.shared is not None:
            gate = 1.0 if self.shared_gate is None else torch.sigmoid(self.shared_gate(x))
            output = output + gate * self.shared(x)
        z_sum = (torch.logsumexp(logits, dim=-1) ** 2).sum()
        return output, RouterRecord(chosen=chosen, balance_sum=sequence_balance(logits, self.moe).sum(), z_sum=z_sum)
