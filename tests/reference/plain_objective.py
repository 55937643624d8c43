"""The objective: which slot predicts what at which depth, and how sums over micro-batches become one number.

With t the token ids, slot i of depth k (0: main prediction) predicts t[i+k+1]; at depth k >= 1 it also reads the
embedding of t[i+k].

    L_k   = (1 / N_k) * sum of cross entropies over the valid targets of depth k in the global batch         [nats per
    token] total = L_0 + lambda / D * sum_k w_k * L_k + router losses

Source: DeepSeek-V3, arXiv 2412.19437, equations 21-25, with N_k in place of their constant T. The parallel heads of
    Gloeckle et al.
(arXiv 2404.19737) are summed unweighted in that paper: that is lambda = D with all w_k = 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.plain_config import PlainConfig
from tests.reference.plain_moe import RouterRecord

FILLER_ID = 0
"""Id read where t[i+k] lies beyond the sample. No valid target depends on it; router statistics do."""


@dataclass(kw_only=True)
class DepthView:
    """What depth k sees of a micro-batch. All [b, s]."""

    inputs: Tensor
    """t[i+k], or FILLER_ID where there is none; for k = 0 the tokens themselves."""
    labels: Tensor
    """t[i+k+1], or FILLER_ID where there is none."""
    valid: Tensor
    """bool: the target exists, is not masked out and lies in the document of slot i."""


def depth_view(tokens: Tensor, base_mask: Tensor, segment_ids: Tensor | None, depth: int) -> DepthView:
    """Shifts by plain indexing.

    For s = 4, tokens a b c d e, depth 1: slots 0..3 read b c d e and predict c d e and nothing.

    Args:
        tokens: [b, s+1].
        base_mask: [b, s], nonzero where the target t[i+1] counts. The target t[j] counts at every depth or at none.
        segment_ids: [b, s] document of each slot (t[s] counts to the document of t[s-1]; mask it if it does not), or
            [b, s+1], or None where documents do not separate.
    """
    s = tokens.shape[1] - 1
    slot = torch.arange(s)

    def token(ahead: int) -> Tensor:
        return torch.where(slot + ahead <= s, tokens[:, (slot + ahead).clamp(max=s)], FILLER_ID)

    target_counts = (slot + depth < s) & (base_mask[:, (slot + depth).clamp(max=s - 1)] != 0)
    if segment_ids is not None:
        ids = segment_ids if segment_ids.shape[1] == s + 1 else torch.cat((segment_ids, segment_ids[:, -1:]), dim=1)
        for ahead in range(1, depth + 2):  # tokens i .. i+k+1, all in one document
            target_counts = target_counts & (ids[:, (slot + ahead).clamp(max=s)] == ids[:, :s])
    return DepthView(inputs=token(depth), labels=token(depth + 1), valid=target_counts)


@dataclass(kw_only=True)
class PlainOutput:
    """One micro-batch. Sums, not means: only `combine` divides."""

    cfg: PlainConfig
    sums: Tensor
    """[1+D] sum of cross entropies over the valid targets."""
    counts: Tensor
    """[1+D] int64, number of valid targets."""
    z_sums: Tensor
    """[1+D] sum of logsumexp(logits)^2 over the valid targets."""
    labels: Tensor
    """[1+D, b, s]."""
    valid: Tensor
    """[1+D, b, s] bool."""
    top1: Tensor
    """[1+D, b, s] id of the largest logit."""
    logits: list[Tensor]
    """1+D times [b, s, vocab], without the padding of the vocabulary."""
    routers: list[RouterRecord]
    """Trunk layers in order, then MTP depths in order (a repeated layer once for each depth)."""

    @property
    def acceptance(self) -> Tensor:
        """[5, 1+D] int64, teacher-forced. For each depth, over its valid slots: how many there are; top-1 is the
        target; top-1 is the main prediction's top-1 for that token, made k slots on; depths 1..k-1 all agreed with the
        main prediction; and depth k then agrees too."""
        columns = []
        agreed = torch.ones_like(self.valid[0])
        for depth, (valid, labels, top1) in enumerate(zip(self.valid, self.labels, self.top1, strict=True)):
            main = torch.full_like(top1, -1)  # beyond the sample: valid nowhere
            main[:, : top1.shape[1] - depth] = self.top1[0][:, depth:]
            agrees = agreed & (top1 == main)
            questions = (valid, valid & (top1 == labels), valid & (top1 == main), valid & agreed, valid & agrees)
            columns.append(torch.stack([answer.sum() for answer in questions]))
            agreed = agrees
        return torch.stack(columns, dim=1)

    @property
    def totals(self) -> PlainTotals:
        """As if this micro-batch were the whole global batch."""
        return combine([self])

    @property
    def losses(self) -> Tensor:
        return self.totals.losses

    @property
    def total(self) -> Tensor:
        return self.totals.total


@dataclass(kw_only=True)
class PlainTotals:
    """A global batch."""

    losses: Tensor
    """[1+D] L_k, nats per token."""
    counts: Tensor
    """[1+D] int64 N_k."""
    router_losses: dict[str, Tensor]
    """"load_balancing_loss" and "z_loss" without their coefficients: mean over sequences and over tokens, summed over
    layers.
    """
    tokens_per_expert: list[Tensor]
    """[E] for each router, over the whole global batch, in the order of `PlainOutput.routers`."""
    total: Tensor


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]. [b, s, v], [b, s] -> [b, s]."""
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels[..., None])[..., 0]


def combine(outputs: list[PlainOutput]) -> PlainTotals:
    """The global batch from all its micro-batches: every sum and every count is global before anything is divided.

    A depth without a single valid target has the loss 0. Router losses are means over all sequences (balance) and all
    tokens (z) of the global batch, valid target or not, summed over routers; the applications of one repeated MTP layer
    share the weight of one.
    """
    cfg = outputs[0].cfg
    counts = torch.stack([o.counts for o in outputs]).sum(0)
    losses = torch.stack([o.sums for o in outputs]).sum(0) / counts.clamp(min=1)
    z_losses = torch.stack([o.z_sums for o in outputs]).sum(0) / counts.clamp(min=1)
    weights = torch.tensor(cfg.depth_weights, dtype=losses.dtype)
    total = (weights * (losses + cfg.logits_z_coeff * z_losses)).sum()

    router_losses, tokens_per_expert = {}, []
    if cfg.moe is not None:
        num_sequences = sum(o.labels.shape[1] for o in outputs)
        num_tokens = sum(o.labels[0].numel() for o in outputs)
        per_router = list(zip(*(o.routers for o in outputs), strict=True))
        num_in_trunk = sum(cfg.is_moe(layer_idx) for layer_idx in range(cfg.num_layers))
        shares = [
            1.0 if idx < num_in_trunk or not cfg.mtp_repeated else 1.0 / cfg.num_depths
            for idx in range(len(per_router))
        ]
        balance = sum(
            share * sum(r.balance_sum for r in records) for share, records in zip(shares, per_router, strict=True)
        )
        z = sum(share * sum(r.z_sum for r in records) for share, records in zip(shares, per_router, strict=True))
        router_losses = {"load_balancing_loss": balance / num_sequences, "z_loss": z / num_tokens}
        tokens_per_expert = [sum(r.tokens_per_expert for r in records) for records in per_router]
        total = (
            total
            + cfg.moe.seq_aux_coeff * router_losses["load_balancing_loss"]
            + cfg.moe.z_coeff * router_losses["z_loss"]
        )
    return PlainTotals(
        losses=losses, counts=counts, router_losses=router_losses, tokens_per_expert=tokens_per_expert, total=total
    )
