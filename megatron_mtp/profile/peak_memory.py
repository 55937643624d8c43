"""Measured peak memory of a training step on this device, next to the prediction."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.device.memory_meter import memory_meter, peak_resident_bytes
from megatron_mtp.device.process_group import job_size
from megatron_mtp.device.select import pick_device
from megatron_mtp.parallel.planner.stage_memory import RankMemory, predict_memory
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.training.setup import setup

STEPS = 2
"""The first step allocates the optimizer's moments; the second shows what every later one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """One rank's memory in bytes.

    Attributes:
        peak: most that tensors held at once in a step: live storage on a CPU, the allocator's peak on a GPU.
        held: what tensors hold between steps.
        resident: largest resident set of the process, libraries included; on a GPU the host's.
        predicted: prediction for this rank.
    """

    rank: int
    stage: int
    peak: int
    held: int
    resident: int
    predicted: RankMemory

    @property
    def error(self) -> float:
        """Predicted over measured peak, less one."""
        return self.predicted.total / self.peak - 1


def measure_peak(cfg: ConfigContainer) -> PeakMemory:
    """Trains two steps in the group of this process, or alone, and releases the run. Every rank calls it.

    Args:
        cfg: finalized for the size of the group.
    """
    resolved = resolve(cfg, job_size())
    with memory_meter(pick_device(cfg.dist.device).torch_device) as meter:
        run = setup(resolved)
        try:
            batches = run.data.train()
            factor = resolved.loss_factor.at(0)
            for _ in range(STEPS):
                batch = next(batches)
                meter.reset_peak()
                run.engine.train(batch, factor)
            peak, held, stage = meter.peak_bytes, meter.now_bytes, run.groups.pp.rank()
            rank, is_cpu = dist.get_rank(), not run.device.is_cuda
        finally:
            run.release()
            del run
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return PeakMemory(
        rank=rank,
        stage=stage,
        peak=peak,
        held=held,
        resident=peak_resident_bytes(),
        predicted=predict_memory(resolved, resolved.layout, stage, is_cpu=is_cpu),
    )
