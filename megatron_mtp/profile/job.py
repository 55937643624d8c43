"""Times every part of a model on this device, sharded as in the run, while the model trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from statistics import fmean
from typing import Any

import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.filled import filled
from megatron_mtp.config.phase_configs import before_phases
from megatron_mtp.config.sections import CheckpointConfig
from megatron_mtp.device.process_group import cores_per_rank
from megatron_mtp.device.worker_pool import WorkerPool
from megatron_mtp.parallel.params import linear_pattern, moe_pattern
from megatron_mtp.parallel.planner.part_costs import VERSION, Link, PartCosts, PartTime, Profile, measured_fields
from megatron_mtp.profile.measure import UNMEASURED, PartMeasurement, measure_links
from megatron_mtp.profile.noise import Load, Noise
from megatron_mtp.verify.run import PRELOAD

LAYERS_OF_A_KIND = 4
"""Enough that a layer's weights have left the cache before its next call."""
MICRO_BATCHES = 4


def profile_config(cfg: ConfigContainer) -> ConfigContainer:
    """A small model of the same parts on one stage: a few layers of each kind, at least one MTP depth, mock data.

    Args:
        cfg: finalized.

    Returns:
        Finalized for one model-parallel block, `block_size` ranks.
    """
    trial, block = before_phases(cfg), block_size(cfg)
    model = trial.model
    kinds = list(zip(linear_pattern(model), moe_pattern(model), strict=True))
    distinct = [kind for kind in dict.fromkeys(kinds) if kind != kinds[-1]]
    # MTP layers follow the last decoder layer's kind where model.mtp_layer_mlp does not say theirs.
    kept = [kind for kind in (*distinct, kinds[-1]) for _ in range(min(LAYERS_OF_A_KIND, kinds.count(kind)))]
    model.num_layers = len(kept)
    if model.num_moe_experts:
        model.moe_layer_freq = [int(is_moe) for _, is_moe in kept]
    if model.experimental_attention_variant:
        model.linear_attention_freq = [int(is_linear) for is_linear, _ in kept]
    if model.position_embedding_type != "learned_absolute":
        model.mtp_num_layers = max(1, model.mtp_num_layers)
    if model.mtp_depth_weights and len(model.mtp_depth_weights) != model.mtp_num_layers:
        model.mtp_depth_weights = None
    model.update(pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=1)
    model.pipeline_model_parallel_layout = "auto"
    replicas = block // (model.tensor_model_parallel_size * model.context_parallel_size)
    batch_size = MICRO_BATCHES * replicas * trial.train.micro_batch_size
    trial.train.update(global_batch_size=batch_size, rampup_batch_size=None)
    trial.validation.update(eval_iters=0, eval_interval=None, eval_micro_batch_size=None, eval_global_batch_size=None)
    # Every rank owns all its optimizer state, so that the time for each parameter is measured without messages.
    trial.ddp.update(use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False)
    trial.dataset.update(mock=True, blend=None, blend_per_split=None, valid_sets=None)
    trial.checkpoint = CheckpointConfig()
    trial.profiling.use_pytorch_profiler = False
    return trial.finalize(block)


def block_size(cfg: ConfigContainer) -> int:
    """Ranks of one pipeline stage that compute together, over TP, CP, EP and ETP."""
    return minimum_world_size(cfg.model) // cfg.model.pipeline_model_parallel_size


class CpuProfiler:
    """Times parts in as many local processes as the run has on this machine, because they share caches and memory.

    A context manager that ends the processes.

    Args:
        cfg: finalized.
        processes: a multiple of `block_size`.
    """

    def __init__(self, cfg: ConfigContainer, processes: int):
        self._cfg, self._processes, self._steps = cfg, processes, 0
        trial, block = profile_config(on_cpu(cfg, processes)), block_size(cfg)
        self._cores = processes * filled(trial.dist.num_threads)
        self._crowding: list[float] = []
        self._pools = [WorkerPool(block, timeout_s=3600.0, preload=PRELOAD) for _ in range(max(1, processes // block))]
        self._threads = ThreadPoolExecutor(len(self._pools))
        self._on_all(lambda pool: pool.hold(PartMeasurement, trial))

    def advance(self, steps: int) -> None:
        """Times further steps in all processes, and what other programs compute meanwhile."""
        self._steps += steps
        load, start = Load(), time.perf_counter()
        own = self._on_all(lambda pool: pool.run_held(PartMeasurement.advance, steps))
        used = load.crowding(sum(map(sum, own)), time.perf_counter() - start, self._cores)
        self._crowding += [] if used is None else [used]

    def profile(self) -> Profile:
        """Medians so far, and the time of messages between two processes."""
        pools = self._on_all(lambda pool: pool.run_held(PartMeasurement.costs))
        costs = mean_costs([found for ranks in pools for found in ranks])
        with WorkerPool(2, preload=PRELOAD) as pair:
            links = pair.run(measure_links, "cpu")[0]
        times = self._on_all(lambda pool: pool.run_held(PartMeasurement.micro_batch_times))
        noise = Noise.of(
            _slowest([rank for ranks in times for rank in ranks]), fmean(self._crowding) if self._crowding else None
        )
        return _profile(self._cfg, costs, links, "cpu", self._processes, self._steps, noise)

    def __enter__(self) -> CpuProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.close()
        self._threads.shutdown()

    def _on_all[T](self, work: Callable[[WorkerPool], T]) -> list[T]:
        return list(self._threads.map(work, self._pools))


def profile_in_job(cfg: ConfigContainer, steps: int) -> Profile:
    """Times parts in the job that this process belongs to, `block_size` ranks; every rank returns the same result.

    With one rank there is no message to time, and the links cost nothing: plan with a profile of two ranks or more.
    """
    measurement = PartMeasurement(profile_config(cfg))
    device = measurement.run.device
    try:
        measurement.advance(steps)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, measurement.costs())
        links = measure_links(device.torch_device.type) if len(everyone) > 1 else (UNMEASURED, UNMEASURED)
        times: list[Any] = [None] * len(everyone)
        dist.all_gather_object(times, measurement.micro_batch_times())
        return _profile(cfg, mean_costs(everyone), links, device.name, len(everyone), steps, Noise.of(_slowest(times)))
    finally:
        measurement.close()


def mean_costs(found: list[PartCosts]) -> PartCosts:
    """The mean over ranks, part by part."""

    def mean(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {kind: mean([value[kind] for value in values]) for kind in first}
        if isinstance(first, PartTime):
            return PartTime(mean([v.forward_ms for v in values]), mean([v.backward_ms for v in values]))
        return sum(values) / len(values) if isinstance(first, float) else first

    names = PartCosts.__dataclass_fields__
    return PartCosts(**{name: mean([getattr(costs, name) for costs in found]) for name in names})


def on_cpu(cfg: ConfigContainer, processes: int) -> ConfigContainer:
    """A finalized copy for the CPU, whose cores `processes` processes share."""
    trial = cfg.copy()
    trial.dist.device = "cpu"
    trial.dist.num_threads = cfg.dist.num_threads or max(1, cores_per_rank() // processes)
    return trial.finalize()


def _slowest(ranks: list[list[float]]) -> list[float]:
    """Time of each micro-batch on the rank where it took longest."""
    return [max(times) for times in zip(*ranks, strict=True)]


def _profile(
    cfg: ConfigContainer,
    costs: PartCosts,
    links: tuple[Link, Link],
    device: str,
    processes: int,
    steps: int,
    noise: Noise,
) -> Profile:
    return Profile(
        version=VERSION,
        costs=replace(costs, pipeline_link=links[0], data_link=links[1]),
        model=measured_fields(cfg.model),
        dtype=cfg.precision.dtype,
        micro_batch_size=cfg.train.micro_batch_size,
        device=device,
        notes={
            "processes": processes,
            "steps": steps,
            "micro_batches": steps * MICRO_BATCHES,
            "noise": noise.as_notes(),
            "noise_in_words": noise.words(),
            "torch": version("torch"),
            "megatron-core": version("megatron-core"),
        },
    )
