"""Sums and counts of global batches, and the losses and rates that they give.

Only `mean` divides by counts: for the gradient (objective.py) and for what is reported, in training and in evaluation.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from megatron_mtp.config.depths import loss_names
from megatron_mtp.objective.acceptance import ROWS

ROUTER_LOSSES = ("seq_load_balancing_loss", "load_balancing_loss", "z_loss")
"""What routers record, by Megatron-Core's names."""


def mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums over counts in fp64, elementwise; NaN where the count is 0."""
    return torch.where(counts > 0, sums.double() / counts, torch.nan)


@dataclass(frozen=True, slots=True)
class BatchMetrics:
    """Metrics of one global batch, or of several added up. On the CPU and, except `local_sums`, the same on every rank.

    Attributes:
        depth_sums: [1+D] fp64, cross entropies of the valid targets in nats.
        depth_counts: [1+D] int64, valid targets.
        acceptance: [rows of `acceptance.ROWS`, 1+D] int64.
        router_sums: [len(ROUTER_LOSSES)] fp64, router losses without their coefficients.
        router_counts: [len(ROUTER_LOSSES)] int64, how many losses were summed; 0 for a loss that the model lacks.
        local_sums: [1+D] fp64, this rank's part of `depth_sums`; zeros before the last stage.
    """

    depth_sums: Tensor
    depth_counts: Tensor
    acceptance: Tensor
    router_sums: Tensor
    router_counts: Tensor
    local_sums: Tensor

    def __add__(self, other: BatchMetrics) -> BatchMetrics:
        """Metrics of both batches together: every target counts the same."""
        return BatchMetrics(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(BatchMetrics)))

    @property
    def losses(self) -> list[float]:
        """Loss of depths 0..D in nats per token; NaN for a depth without valid targets."""
        return mean(self.depth_sums, self.depth_counts).tolist()

    @property
    def router(self) -> dict[str, float]:
        """Router losses by name: means over MoE layers, micro-batches and data-parallel ranks. Evaluation has none."""
        means = mean(self.router_sums, self.router_counts).tolist()
        return {name: value for name, value, n in zip(ROUTER_LOSSES, means, self.router_counts, strict=True) if n}

    def valid_losses(self) -> dict[str, float]:
        """Losses by name, without depths that have no valid targets."""
        counts = self.depth_counts.tolist()
        names = loss_names(len(counts) - 1)
        return {name: loss for name, loss, count in zip(names, self.losses, counts, strict=True) if count}

    def named_losses(self) -> dict[str, float]:
        """All losses in console order: the main one, the routers', then one for each MTP depth."""
        main, *depths = zip(loss_names(len(self.depth_counts) - 1), self.losses, strict=True)
        routers = {name.removeprefix("seq_"): value for name, value in self.router.items()}
        return dict([main]) | routers | dict(depths)

    def acceptance_rates(self) -> dict[str, float]:
        """Acceptance rates by name. A rate without valid slots is left out.

        lm/top1_target, mtp_k/top1_target: the depth's top-1 is the target. mtp_k/top1_main: it is the main prediction's
        top-1 for that token. mtp_k/accepted: the same, given that depths 1..k-1 agreed, as a drafter would be accepted.
        mtp/accepted_length: expected number of drafted tokens accepted in a row.
        """
        rows = dict(zip(ROWS, self.acceptance, strict=True))
        top1_target = mean(rows["label_hits"], rows["valid"]).tolist()
        top1_main = mean(rows["main_hits"], rows["valid"]).tolist()
        accepted = mean(rows["chain_hits"], rows["chain_valid"]).tolist()
        rates = {"lm/top1_target": top1_target[0]}
        for depth in range(1, len(accepted)):
            rates[f"mtp_{depth}/top1_target"] = top1_target[depth]
            rates[f"mtp_{depth}/top1_main"] = top1_main[depth]
            rates[f"mtp_{depth}/accepted"] = accepted[depth]
        rates = {name: rate for name, rate in rates.items() if rate == rate}  # NaN is not equal to itself
        if len(accepted) > 1:
            known = (rates.get(f"mtp_{depth}/accepted", 0.0) for depth in range(1, len(accepted)))
            rates["mtp/accepted_length"] = sum(accumulate(known, operator.mul))
        return rates

    def acceptance_by_depth(self) -> dict[str, list[int]]:
        """Acceptance counts as the train state keeps them: row name -> one count for each of the depths 1..D."""
        return {name: row[1:] for name, row in zip(ROWS, self.acceptance.tolist(), strict=True)}
