"""Vocabulary-parallel cross entropy over chunks of tokens: the logits of one chunk exist at a time.

The forward pass keeps the log-sum-exp of each token; the backward pass computes each chunk's logits again. With
tensor parallelism there are two floating-point collectives for all tokens of all depths together, none per chunk.
"Chunk" in this file is a chunk of logits (`logits_chunk_tokens`), not a model chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_COUNTED = 7 / 8  # of the tokens; above it, selecting the counted ones costs more than it saves


class VocabShard(NamedTuple):
    """The rows of the output weight on this rank: ids `start` to `start + rows - 1`, then padding."""

    start: int
    rows: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of a padded `weight` [v_padded/tp, h]; ids from `vocab_size` on are padding."""
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * weight.shape[0]
        rows = max(0, min(weight.shape[0], vocab_size - start))
        return cls(start, rows, group if size > 1 else None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [n, h], weight [v/tp, h], targets [n]) -> loss, log-sum-exp and top-1 id of each token, all [n]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        maximum = hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
        sum_exp = hidden.new_zeros(num_tokens, dtype=torch.float32)
        target_logit = hidden.new_zeros(num_tokens, dtype=torch.float32)
        top1 = targets.new_zeros(num_tokens)
        rows = weight[: shard.rows]
        if shard.rows:
            for start in range(0, num_tokens, chunk_tokens):
                part = slice(start, start + chunk_tokens)
                logits = torch.mm(hidden[part], rows.t()).float()  # [chunk, v/tp]
                torch.max(logits, dim=1, out=(maximum[part], top1[part]))
                local, inside = _local_targets(targets[part], shard)
                target_logit[part] = logits.gather(1, local[:, None]).squeeze(1).masked_fill_(~inside, 0.0)
                sum_exp[part] = logits.sub_(maximum[part, None]).exp_().sum(dim=1)
        top1 += shard.start
        if shard.group is not None:
            maximum, sum_exp, target_logit, top1 = _reduce(maximum, sum_exp, target_logit, top1, shard.group)
        lse = sum_exp.log_().add_(maximum)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        ctx.mark_non_differentiable(top1)
        return lse - target_logit, lse, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_lse: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        counted = _counted_rows(grad_loss, grad_lse)
        if counted is not None:
            all_hidden = hidden
            hidden, targets, lse, grad_loss, grad_lse = (
                x[counted] for x in (hidden, targets, lse, grad_loss, grad_lse)
            )
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        # fp32 whatever the weight's dtype: it is a sum over all tokens of all depths.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        rows = weight[: shard.rows]
        for start in range(0, hidden.shape[0] if shard.rows else 0, ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            grad = torch.mm(hidden[part], rows.t()).float()  # logits, then in place their gradient
            grad.sub_(lse[part, None]).exp_().mul_((grad_loss[part] + grad_lse[part])[:, None])
            local, inside = _local_targets(targets[part], shard)
            grad.scatter_add_(1, local[:, None], -(grad_loss[part] * inside)[:, None])
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, rows, out=grad_hidden[part])
            if grad_weight is not None:
                _add_outer(grad_weight[: shard.rows], grad, hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if counted is not None and grad_hidden is not None:
            grad_hidden = torch.zeros_like(all_hidden).index_copy_(0, counted, grad_hidden)
        return grad_hidden, grad_weight, None, None, None


def _counted_rows(grad_loss: Tensor, grad_lse: Tensor) -> Tensor | None:
    """Indices of the tokens with a gradient, where masks exclude many, such as prompts and padding; None: all.

    On a GPU all tokens are used, because the host would have to wait for the count.
    """
    if grad_loss.device.type != "cpu":
        return None
    has_gradient = (grad_loss != 0) | (grad_lse != 0)
    return has_gradient.nonzero().squeeze(1) if has_gradient.sum() < MAX_COUNTED * len(grad_loss) else None


def _local_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    local = targets - shard.start
    inside = (local >= 0) & (local < shard.rows)
    return local.clamp(0, max(shard.rows - 1, 0)), inside


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    if grad.dtype == torch.float32:
        total.addmm_(grad.t(), hidden)
    else:
        total.add_(torch.mm(grad.t(), hidden))


def _reduce(
    maximum: Tensor, sum_exp: Tensor, target_logit: Tensor, top1: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Joins the shards' results. Ties between shards go to the smallest id, as in an argmax over all logits."""
    highest = maximum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    top1 = torch.where(maximum == highest, top1, torch.iinfo(top1.dtype).max)
    dist.all_reduce(top1, op=dist.ReduceOp.MIN, group=group)
    sums = torch.stack((sum_exp * (maximum - highest).exp(), target_logit))
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1], top1


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each token against the rows of `weight`, one chunk of logits at a time.

    Args:
        hidden: [n, h], the same on every rank of the tensor-parallel group; its gradient is this shard's part only
            (a preceding copy-to-region or sequence gather sums it).
        weight: [v_padded/tp, h], this rank's rows; padding rows are ignored.
        targets: [n] int64, ids below the vocabulary size (0 where masked out).
        shard: the ids of the rows.
        chunk_tokens: tokens in one chunk of logits.

    Returns:
        loss [n] fp32 in nats, log-sum-exp [n] fp32, top-1 id [n] int64. Nothing is masked or divided here.
    """
    results: tuple[Tensor, Tensor, Tensor] = _ChunkedCrossEntropy.apply(hidden, weight, targets, shard, chunk_tokens)
    return results
