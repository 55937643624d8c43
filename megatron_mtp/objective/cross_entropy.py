"""Vocabulary-parallel cross entropy over chunks of tokens, with its gradient made in the forward pass.

Before a step the weight of every token in the total is known. So a chunk's logits are computed once: they give losses,
top-1 ids, and at once the gradients of the hidden states and of the weight, in three matrix products. With tensor
parallelism the statistics of a chunk travel while the next chunk's logits are computed.
"Chunk" in this file is a chunk of logits (`logits_chunk_tokens`), not a model chunk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_ID = torch.iinfo(torch.int64).max
_BLOCK = 128  # logits of a row compared at a time in the search for the largest; 64 to 256 are equally fast
MAX_SELECTED = 7 / 8  # of a chunk's tokens; selecting more than this costs more than it saves


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


class TokenLosses(NamedTuple):
    """What `chunked_cross_entropy` finds.

    Attributes:
        total: [] fp32, sum of weights * (cross entropy + z_loss_coeff * log-sum-exp^2); the only one with a gradient.
        loss: [n] fp32 in nats.
        top1: [n] int64, the most probable id.
    """

    total: Tensor
    loss: Tensor
    top1: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    shard: VocabShard,
    chunk_tokens: int,
    z_loss_coeff: float = 0.0,
    gradient_scale: Tensor | float = 1.0,
) -> TokenLosses:
    """Cross entropy of each token against the rows of `weight`, one chunk of logits at a time.

    Args:
        hidden: [n, h], the same on every rank of the tensor-parallel group; its gradient is this shard's part only
            (a preceding copy-to-region or sequence gather sums it).
        weight: [v_padded/tp, h], this rank's rows; padding rows are ignored.
        targets: [n] int64, ids below the vocabulary size (0 where masked out).
        token_weights: [n] fp32, what the total multiplies each token's loss by; 0 where masked out.
        shard: the ids of the rows.
        chunk_tokens: tokens in one chunk of logits.
        z_loss_coeff: coefficient of log-sum-exp^2 beside the cross entropy.
        gradient_scale: the gradient that the total will receive, roughly. Gradients are made at this scale and
            corrected in the backward pass; in fp16 small ones would vanish at another.
    """
    is_training = torch.is_grad_enabled()
    num_tokens = len(targets)
    chunks = _Chunks(
        hidden=hidden,
        rows=weight[: shard.rows],
        targets=targets,
        token_weights=token_weights,
        shard=shard,
        z_loss_coeff=z_loss_coeff,
        gradient_scale=gradient_scale,
        loss=hidden.new_empty(num_tokens, dtype=torch.float32),
        lse=hidden.new_empty(num_tokens, dtype=torch.float32),
        top1=torch.empty_like(targets),
        grad_hidden=torch.zeros_like(hidden) if is_training and hidden.requires_grad else None,
        # fp32 whatever the weight's dtype: it is a sum over all tokens of all depths.
        grad_weight=torch.zeros_like(weight, dtype=torch.float32) if is_training and weight.requires_grad else None,
    )
    with torch.no_grad():
        chunks.run(chunk_tokens)
        losses = chunks.loss + z_loss_coeff * chunks.lse.square() if z_loss_coeff else chunks.loss
        total = (token_weights * losses).sum()
    if chunks.has_gradient:
        total = _Prepared.apply(hidden, weight, total, chunks.grad_hidden, chunks.grad_weight, gradient_scale)
    return TokenLosses(total, chunks.loss, chunks.top1)


class _Prepared(torch.autograd.Function):
    """Attaches gradients that exist already: the value of `total` is unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        gradient_scale: Tensor | float,
    ) -> Tensor:
        ctx.gradients, ctx.weight_dtype, ctx.scale = (grad_hidden, grad_weight), weight.dtype, gradient_scale
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, (None, None)
        factor = grad_total / ctx.scale
        is_one = factor.device.type == "cpu" and float(factor) == 1.0  # on a GPU the host would have to wait
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None and not is_one:
                gradient.mul_(factor)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


@dataclass(slots=True)
class _Chunk:
    """One chunk of tokens between its logits and its gradient.

    Attributes:
        part: the tokens.
        exponentials: [chunk, v/tp] fp32, exp(logit - maximum of this shard).
        own: [3, chunk] fp32 of this shard: maximum, sum of the exponentials, target's logit (0 elsewhere).
        every: [tp, 3, chunk], `own` of every shard, once `travelling` has ended; without shards `own`, and None.
    """

    part: slice
    exponentials: Tensor
    own: Tensor
    every: Tensor
    travelling: dist.Work | None


@dataclass(slots=True)
class _Chunks:
    """The loop over chunks. Arguments as in `chunked_cross_entropy`.

    Filled in are loss, log-sum-exp and top-1 id of each token, all [n], and the gradients that are not None.
    """

    hidden: Tensor
    rows: Tensor
    targets: Tensor
    token_weights: Tensor
    shard: VocabShard
    z_loss_coeff: float
    gradient_scale: Tensor | float
    loss: Tensor
    lse: Tensor
    top1: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None

    @property
    def has_gradient(self) -> bool:
        """Whether hidden states or weight get a gradient."""
        return self.grad_hidden is not None or self.grad_weight is not None

    def run(self, chunk_tokens: int) -> None:
        """Goes through all tokens. With shards, one chunk's statistics travel while the next one's logits are made."""
        parts = [slice(start, start + chunk_tokens) for start in range(0, len(self.targets), chunk_tokens)]
        if self.shard.group is None:
            for part in parts:
                self._finish(self._logits(part))
            return
        waiting: deque[_Chunk] = deque()  # a name would keep the logits of a finished chunk alive
        for part in parts:
            waiting.append(self._logits(part))
            if len(waiting) > 1:
                self._finish(waiting.popleft())
        while waiting:
            self._finish(waiting.popleft())
        dist.all_reduce(self.top1, op=dist.ReduceOp.MIN, group=self.shard.group)

    def _logits(self, part: slice) -> _Chunk:
        """Computes a chunk's logits and sends their statistics; fills in this shard's top-1 ids."""
        logits = torch.mm(self.hidden[part], self.rows.t()).float()  # [chunk, v/tp]
        own = logits.new_empty(3, logits.shape[0])
        if self.shard.rows:
            own[0], top1 = _max_and_first(logits)
            self.top1[part] = top1 + self.shard.start
            local, inside = self._local_targets(part)
            own[2] = logits.gather(1, local[:, None]).squeeze(1).masked_fill_(~inside, 0.0)
            torch.sum(logits.sub_(own[0, :, None]).exp_(), dim=1, out=own[1])
        else:
            own[0], own[1:], self.top1[part] = -torch.inf, 0.0, NO_ID
        if self.shard.group is None:
            return _Chunk(part, logits, own, own, None)
        every = own.new_empty(self.shard.group.size(), *own.shape)
        travelling = dist.all_gather_into_tensor(every.flatten(0, 1), own, group=self.shard.group, async_op=True)
        return _Chunk(part, logits, own, every, travelling)

    def _finish(self, chunk: _Chunk) -> None:
        """Joins the shards' statistics, then makes the chunk's gradient; its logits end here."""
        part, own = chunk.part, chunk.own
        if chunk.travelling is None:
            lse = own[1].log().add_(own[0])
            target_logit = own[2]
        else:
            chunk.travelling.wait()
            highs, sums, target_logits = chunk.every.unbind(1)  # [tp, chunk] each
            high = highs.amax(dim=0)
            lse = (sums * (highs - high).exp()).sum(dim=0).log_().add_(high)
            target_logit = target_logits.sum(dim=0)
            # Ties between shards go to the smallest id, as in an argmax over all logits.
            self.top1[part].masked_fill_(own[0] != high, NO_ID)
        self.lse[part], self.loss[part] = lse, lse - target_logit
        if not self.has_gradient or not self.shard.rows:
            return
        token_weights = self.token_weights[part] * self.gradient_scale
        weight_of_lse = token_weights
        if self.z_loss_coeff:
            weight_of_lse = token_weights * (1 + 2 * self.z_loss_coeff * lse)
        gradient = chunk.exponentials.mul_(((own[0] - lse).exp_() * weight_of_lse)[:, None])
        local, inside = self._local_targets(part)
        gradient.scatter_add_(1, local[:, None], -(token_weights * inside)[:, None])
        self._add_products(part, gradient, token_weights)

    def _add_products(self, part: slice, gradient: Tensor, token_weights: Tensor) -> None:
        """Adds the two products of a chunk's gradient [chunk, v/tp], without the tokens that have none."""
        hidden, selected = self.hidden[part], _tokens_with_gradient(token_weights)
        if selected is not None:
            gradient, hidden = gradient[selected], hidden[selected]
        if self.grad_weight is not None:
            _add_outer(self.grad_weight[: self.shard.rows], gradient, hidden)
        gradient = gradient.to(self.rows.dtype)
        if self.grad_hidden is not None:
            if selected is None:
                torch.mm(gradient, self.rows, out=self.grad_hidden[part])
            else:
                self.grad_hidden[part].index_copy_(0, selected, torch.mm(gradient, self.rows))

    def _local_targets(self, part: slice) -> tuple[Tensor, Tensor]:
        """Row of each target in this shard, clamped into it, and whether it is there."""
        local = self.targets[part] - self.shard.start
        inside = (local >= 0) & (local < self.shard.rows)
        return local.clamp(0, max(self.shard.rows - 1, 0)), inside


def _max_and_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of [n, v], and its smallest index, [n] each.

    On a CPU `torch.max` with indices takes four times as long as `amax`. So the maxima of blocks are compared first,
    and only the block with the maximum is searched. NaN counts as the maximum, as in torch.
    """
    num_ids = logits.shape[1]
    width = min(_BLOCK, num_ids)
    blocks = logits[:, : num_ids - num_ids % width].view(-1, num_ids // width, width)  # no copy
    high, block = blocks.amax(dim=2).max(dim=1)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, width)).squeeze(1).max(dim=1).indices
    first = block * width + inside
    if num_ids % width:
        rest, in_rest = logits[:, num_ids - num_ids % width :].max(dim=1)
        is_rest = (rest > high) | (rest.isnan() & ~high.isnan())
        high = torch.where(is_rest, rest, high)
        first = torch.where(is_rest, in_rest + num_ids - num_ids % width, first)
    return high, first


def _tokens_with_gradient(token_weights: Tensor) -> Tensor | None:
    """Indices of the tokens with a gradient, where masks exclude many, such as prompts and padding; None: all.

    On a GPU all tokens are used, because the host would have to wait for the count.
    """
    if token_weights.device.type != "cpu":
        return None
    has_gradient = token_weights != 0
    return has_gradient.nonzero().squeeze(1) if has_gradient.sum() < MAX_SELECTED * len(token_weights) else None


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient^T hidden, [v/tp, h]; `total` and `gradient` are fp32.

    On a CPU a product in bf16 would be written, read and converted for each chunk, which takes three times as long as
    the whole product in fp32.
    """
    if hidden.dtype == torch.float32 or total.device.type == "cpu":
        total.addmm_(gradient.t(), hidden.float())
    else:
        total.add_(torch.mm(gradient.to(hidden.dtype).t(), hidden))
