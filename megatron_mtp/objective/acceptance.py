"""Acceptance counts of every depth, from the same logits as the loss, in int64.

Teacher-forced: the context of a slot is the text, as in training. For depth k at slot i, whose target is t[i+k+1],
three things are counted: whether its top-1 is the target; whether it is the main prediction's top-1 for that token
(made at slot i+k); and the same, given that depths 1..k-1 agreed with the main prediction.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Rows of the counts; columns are depths 0..D. Depth 0 agrees with itself: its last three rows equal the first.
ROWS = ("valid", "label_hits", "main_hits", "chain_valid", "chain_hits")


def acceptance_counts(top1: Tensor, labels: Tensor, loss_mask: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Counts of one micro-batch on this rank.

    Args:
        top1: [1+D, b, s/cp] int64, the most probable id of each depth.
        labels: [1+D, b, s/cp] int64.
        loss_mask: [1+D, b, s/cp], non-zero where the target is valid.
        cp_group: shards the sequence in Megatron's zigzag order; depth k needs the main prediction k slots later.

    Returns:
        [len(ROWS), 1+D] int64. With context parallelism the first rank of the group returns the counts of the full
        sequence and the others zeros, so that a sum over ranks counts each slot once.

    Example:
        With D = 1, four slots, main top-1 [5, 6, 7, 8] and depth-1 top-1 [6, 0, 8, 0]: depth 1 agrees at slots 0 and 2,
        since the main prediction for the same tokens is one slot later: [6, 7, 8].
    """
    top1, labels, valid = (_full_sequence(x, cp_group) for x in (top1, labels, loss_mask != 0))
    counts = torch.zeros(len(ROWS), top1.shape[0], dtype=torch.int64, device=top1.device)
    if cp_group.size() > 1 and cp_group.rank() != 0:
        return counts
    chain = torch.ones_like(valid[0])
    for depth in range(top1.shape[0]):
        slots = valid[depth].clone()
        agrees = torch.zeros_like(slots)
        length = slots.shape[-1] - depth
        agrees[:, :length] = top1[depth][:, :length] == top1[0][:, depth:]
        counts[0, depth] = slots.sum()
        counts[1, depth] = (slots & (top1[depth] == labels[depth])).sum()
        counts[2, depth] = (slots & agrees).sum()
        counts[3, depth] = (slots & chain).sum()
        chain = chain & agrees
        counts[4, depth] = (slots & chain).sum()
    return counts


def _full_sequence(local: Tensor, cp_group: ProcessGroup) -> Tensor:
    """[..., s/cp] in zigzag shards -> [..., s] on every rank. Rank r holds pieces r and 2*cp-1-r of 2*cp."""
    size = cp_group.size()
    if size == 1:
        return local
    sent = local.to(torch.int64).contiguous()
    shards = [torch.empty_like(sent) for _ in range(size)]
    dist.all_gather(shards, sent, group=cp_group)
    halves = [shard.chunk(2, dim=-1) for shard in shards]
    ordered = [first for first, _ in halves] + [second for _, second in reversed(halves)]
    return torch.cat(ordered, dim=-1).to(local.dtype)
