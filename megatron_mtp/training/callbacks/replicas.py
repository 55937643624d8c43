"""Compares the weights of data-parallel replicas, which must be equal to the last bit.

A difference is a defect of memory or software.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ReplicaError
from megatron_mtp.mcore.optimizer import gather_weights
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.training.callbacks.base import ConfiguredCallback
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult

SHOWN = 3


class ReplicaCheck(ConfiguredCallback):
    """Runs `check_replicas` every `interval` steps."""

    def __init__(self, interval: int):
        self.interval = interval

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> ReplicaCheck | None:
        """Asked for by train.check_replicas_interval."""
        return cls(cfg.train.check_replicas_interval) if cfg.train.check_replicas_interval else None

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """Checks where the interval divides the iteration."""
        if state.iteration % self.interval == 0:
            check_replicas(run.engine.chunks, run.groups)


def check_replicas(chunks: list[nn.Module], groups: ProcessGroupCollection) -> None:
    """A collective. One pass over the weights; 8 bytes for each parameter are exchanged.

    Args:
        chunks: wrapped chunks.
        groups: of the layout. Experts are compared over the ranks that hold the same experts.

    Raises:
        ReplicaError: on every rank: names the ranks that differ from most others, and parameters.
    """
    gather_weights(chunks)
    named = [(name, weight) for chunk in chunks for name, weight in unwrap(chunk).named_parameters()]
    is_expert = [not getattr(weight, "allreduce", True) for _, weight in named]
    problems: list[str] = []
    for group, wanted in ((groups.dp_cp, False), (groups.expt_dp, True)):
        chosen = [item for item, expert in zip(named, is_expert, strict=True) if expert is wanted]
        problems += _compare(chosen, group)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    found = sorted({problem for one in everyone for problem in one})
    if found:
        raise ReplicaError(
            "replicas of the weights differ: "
            + "; ".join(found)
            + ". Memory or an interconnect is failing, or an update was lost. The run stops; start it again to resume "
            "from the last checkpoint. If it happens twice, remove that machine from the job."
        )


def _compare(named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> list[str]:
    if not named or group.size() == 1:
        return []
    own = torch.stack([fingerprint(weight) for _, weight in named])
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(everyone, own, group=group)
    table = torch.stack(everyone).tolist()  # [replicas, parameters]
    ranks = dist.get_process_group_ranks(group)
    usual = [Counter(column).most_common(1)[0][0] for column in zip(*table, strict=True)]
    problems = []
    for rank, row in zip(ranks, table, strict=True):
        odd = [named[i][0] for i, (value, expected) in enumerate(zip(row, usual, strict=True)) if value != expected]
        if odd:
            more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
            problems.append(f"rank {rank}: {', '.join(odd[:SHOWN])}{more}")
    return problems


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor's bits, [] int64, on its device: any single changed bit changes it."""
    return torch.hash_tensor(tensor.detach()).view(torch.int64)
