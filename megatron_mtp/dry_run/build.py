"""Builds every distinct rank of a job without memory or messages, and reports what would fail at its launch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.checkpoint.progress import find_phase, read_progress
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.mcore.rules import torch_backend_problems, without_transformer_engine
from megatron_mtp.config.units import GIB
from megatron_mtp.data.sources import check_data
from megatron_mtp.device.fake import fake_world
from megatron_mtp.errors import ConfigError, MegatronMTPError, Problem
from megatron_mtp.mcore.groups import destroy_model_parallel, seed_dropout
from megatron_mtp.mcore.optimizer import initialize_optimizer_state, single_optimizers
from megatron_mtp.model.build import build_model
from megatron_mtp.model.sharded import sharded_tensors
from megatron_mtp.parallel.params import count_parameters, rank_parameters
from megatron_mtp.parallel.planner.stage_memory import RankMemory, predict_memory
from megatron_mtp.parallel.resolve import ResolvedRun
from megatron_mtp.training.optimizer import build_optimizer, wrap_model
from megatron_mtp.training.setup import make_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRank:
    """What one rank holds, counted on the modules, gradient buffers and optimizer that it would train with.

    Attributes:
        parameters: of all its chunks.
        expert_parameters: those of routed experts among them.
        weight_bytes: parameters as the forward pass reads them.
        gradient_bytes: gradient buffers.
        optimizer_bytes: master weights and moments.
        full_sizes: key in the sharded state dict -> elements of the full parameter, of which this rank holds a part.
    """

    rank: int
    parameters: int
    expert_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    full_sizes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """The ranks of one pipeline stage.

    Attributes:
        ranks: all ranks of the stage; they hold equally many parameters.
        holds: symbols of each chunk, such as ("Ettt",).
        built: the ranks that were built: the first and the last, whose shares of the optimizer may differ.
        predicted_parameters: of each rank, from `parallel/params.py`.
        planned: memory of each rank, from `parallel/planner/stage_memory.py`.
    """

    stage: int
    ranks: list[int]
    holds: tuple[str, ...]
    built: list[BuiltRank]
    predicted_parameters: int
    planned: RankMemory

    @property
    def fullest(self) -> BuiltRank:
        """The rank with the largest share of the optimizer."""
        return max(self.built, key=lambda built: built.optimizer_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes that were built, plus the planned activations and workspace of a step."""
        full = self.fullest
        held = full.weight_bytes + full.gradient_bytes + full.optimizer_bytes
        return held + self.planned.activations + self.planned.workspace


@dataclass(slots=True, kw_only=True)
class DryRun:
    """What a dry run found.

    Attributes:
        parameters: of the complete model, each shared tensor once, from the ranks that were built; None if a rank could
            not be built.
        predicted_parameters: the same number from `parallel/params.py`.
        problems: what would fail at launch, each one sentence or more.
        notes: differences between what was built and the job that do not change the counts.
    """

    world_size: int
    layout: str
    predicted_parameters: int
    stages: list[StageReport] = field(default_factory=list)
    parameters: int | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _check_folders(run: ResolvedRun) -> None:
    """Checks the folders of checkpoints, where this is the phase in which the run would go on.

    Raises:
        CheckpointError: it would be refused.
    """
    whole = run.timeline.cfg
    timeline, index = find_phase(whole, read_progress(whole.checkpoint.load))
    if timeline.phases[index].name == run.phase.name:
        check_run_directory(run.cfg, run.phase.name)


def dry_run(
    run: ResolvedRun, memory_limit_gib: float | None = None, report: Callable[[str], None] = lambda _: None
) -> DryRun:
    """Builds the ranks of a job one after the other, in this process.

    Args:
        run: the resolved run, with a known vocabulary size.
        memory_limit_gib: of one device; None: not checked.
        report: called with a line of text before each part of the work.
    """
    cfg, layout, world_size = run.cfg, run.layout, run.world_size
    predicted = count_parameters(cfg.model).total
    found = DryRun(world_size=world_size, layout=layout.string, predicted_parameters=predicted)
    report("opening data and folders")
    found.problems += _found_problems(check_data, cfg) + _found_problems(lambda _: _check_folders(run), cfg)
    if cfg.dist.device == "cpu":
        found.problems += torch_backend_problems(cfg.model)
    planned = [predict_memory(run, layout, stage) for stage in range(layout.pp)]
    run, found.notes = _for_torch_backend(run)
    failures: dict[str, list[int]] = {}
    for stage in range(layout.pp):
        report(f"building stage {stage} of {layout.pp}")
        ranks = [rank for rank in range(world_size) if run.grid.stage(rank) == stage]
        try:
            built = [build_rank(run, rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))]
        except Exception as error:  # whatever stops a rank here stops it at launch
            failures.setdefault(_text(error), []).append(stage)
            continue
        found.stages.append(
            StageReport(
                stage=stage,
                ranks=ranks,
                holds=tuple("".join(chunk) for chunk in layout.chunks[stage]),
                built=built,
                predicted_parameters=rank_parameters(run.cfg.model, layout, stage).total,
                planned=planned[stage],
            )
        )
    found.problems += [
        Problem(where=_stage_names(stages), rule=f"cannot be built: {text}") for text, stages in failures.items()
    ]
    if not failures:
        sizes = {key: size for stage in found.stages for rank in stage.built for key, size in rank.full_sizes.items()}
        found.parameters = sum(sizes.values())
    found.problems += [Problem(rule=rule) for rule in _miscounts(found) + _too_full(found, memory_limit_gib)]
    return found


def build_rank(run: ResolvedRun, rank: int) -> BuiltRank:
    """Builds model, gradient buffers and optimizer of one rank on the meta device, and counts them.

    Args:
        run: the resolved run; the torch backend must be able to build it.
    """
    cfg = run.cfg
    with fake_world(rank, run.world_size) as device, _meta_noise_off():
        groups = make_groups(run)
        try:
            seed_dropout(cfg.rng.seed, pp_rank=groups.pp.rank())
            chunks = build_model(run, groups, device)
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
            sizes = full_sizes(chunks)
            wrapped = wrap_model(cfg, chunks, groups, device)
            singles = single_optimizers(build_optimizer(cfg, wrapped, groups))
            buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
            return BuiltRank(
                rank=rank,
                parameters=sum(parameter.numel() for parameter in parameters),
                expert_parameters=sum(p.numel() for p in parameters if not getattr(p, "allreduce", True)),
                weight_bytes=_bytes(parameters),
                gradient_bytes=_bytes([buffer.grad_data for buffer in buffers]),
                optimizer_bytes=_optimizer_bytes(singles, parameters),
                full_sizes=sizes,
            )
        finally:
            destroy_model_parallel()


def full_sizes(chunks: Sequence[nn.Module]) -> dict[str, int]:
    """Elements of every full parameter of which these chunks hold a part, by its key in the sharded state dict."""
    storages = {parameter.untyped_storage()._cdata for chunk in chunks for parameter in chunk.parameters()}
    shards = [shard for chunk in chunks for shard in sharded_tensors(chunk)]
    return {
        shard.key: math.prod(shard.global_shape) for shard in shards if shard.data.untyped_storage()._cdata in storages
    }


def _optimizer_bytes(singles: list[Any], parameters: list[nn.Parameter]) -> int:
    """Master weights and moments. A master weight in fp32 training is the weight itself and counts nothing."""
    weights = {parameter.untyped_storage()._cdata for parameter in parameters}
    tensors: list[torch.Tensor] = []
    for single in singles:
        initialize_optimizer_state(single)
        masters = [parameter for group in single.optimizer.param_groups for parameter in group["params"]]
        tensors += [master for master in masters if master.untyped_storage()._cdata not in weights]
        for state in single.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return _bytes(tensors)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; a shared storage counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _for_torch_backend(run: ResolvedRun) -> tuple[ResolvedRun, list[str]]:
    """The run with the torch backend, in the same layout, and notes on the fields that it leaves out."""
    if run.cfg.model.backend == "torch":
        return run, []
    trial = run.cfg.copy()
    trial.model, left_out = without_transformer_engine(trial.model)
    notes = [f"built without {name}, which needs Transformer Engine and holds no parameters" for name in left_out]
    return replace(run, cfg=trial.finalize(run.world_size)), notes


def _found_problems(check: Callable[[ConfigContainer], object], cfg: ConfigContainer) -> list[Problem]:
    try:
        check(cfg)
    except MegatronMTPError as error:
        return error.problems
    return []


def _miscounts(found: DryRun) -> list[str]:
    """Differences between what was predicted and what was built, which are errors of this package."""
    problems = [
        f"stage {stage.stage}, rank {rank.rank}: {rank.parameters:,} parameters were built and "
        f"{stage.predicted_parameters:,} predicted. Please report this with the config."
        for stage in found.stages
        for rank in stage.built
        if rank.parameters != stage.predicted_parameters
    ]
    if found.parameters not in (None, found.predicted_parameters):
        problems.append(
            f"the complete model: {found.parameters:,} parameters were built and {found.predicted_parameters:,} "
            "predicted. Please report this with the config."
        )
    return problems


def _too_full(found: DryRun, limit_gib: float | None) -> list[str]:
    if limit_gib is None:
        return []
    return [
        f"stage {stage.stage} ({' and '.join(stage.holds)}) needs {stage.peak_bytes / GIB:.1f} GiB on each rank, and a "
        f"device has {limit_gib:.1f}. `megatron-mtp plan --search` finds sizes that fit."
        for stage in found.stages
        if stage.peak_bytes > limit_gib * GIB
    ]


def _text(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return " ".join(map(str, error.problems))
    return str(error) if isinstance(error, MegatronMTPError) else f"{type(error).__name__}: {error}"


def _stage_names(stages: list[int]) -> str:
    return f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(map(str, stages))}"


@contextmanager
def _meta_noise_off() -> Iterator[None]:
    """Silences Megatron-Core's advice about speed on GPUs, which comes for each layer of each rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron.core")
        yield
