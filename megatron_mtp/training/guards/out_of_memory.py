"""The message when a rank runs out of memory: the rank, planned and used memory, and what each remedy would save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.depths import Depths
from megatron_mtp.config.units import GIB
from megatron_mtp.device.memory_limits import memory_limits
from megatron_mtp.device.memory_meter import peak_resident_bytes
from megatron_mtp.errors import ConfigError, OutOfMemoryError, PlanError
from megatron_mtp.parallel.planner.stage_memory import MemoryModel, RankMemory, predict_memory
from megatron_mtp.parallel.resolve import ResolvedRun, resolve

# Messages of torch's CPU allocator, the C++ library and the operating system: their RuntimeErrors have no own type.
TEXTS = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes to a config, and the planned peak of its fullest stage after them."""

    changes: str
    peak_bytes: int


@contextmanager
def explained_out_of_memory(run: ResolvedRun, rank: int) -> Iterator[None]:
    """Turns an out-of-memory error inside the block into an error for the user.

    Raises:
        OutOfMemoryError: instead of the errors of torch and Python; other errors pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        is_cpu = run.cfg.dist.device == "cpu" or not torch.cuda.is_available()
        used = _used_on_cpu() if is_cpu else _used_on_gpu()
        raise OutOfMemoryError(explanation(run, rank, str(error), used, is_cpu=is_cpu)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in TEXTS)


def explanation(run: ResolvedRun, rank: int, cause: str, used: str, *, is_cpu: bool) -> str:
    """The message for the user.

    Args:
        cause: text of the original error; its first line is quoted.
        used: memory that this process had allocated, as text.
    """
    layout, stage = run.layout, run.grid.stage(rank)
    planned = predict_memory(run, layout, stage, is_cpu=is_cpu)
    now = peak_bytes(run, is_cpu=is_cpu)
    holds = " and ".join("".join(chunk) for chunk in layout.chunks[stage])
    lines = [
        f"rank {rank} of {run.world_size}, pipeline stage {stage} of {layout.pp} ({holds}), ran out of memory: "
        f"{cause.splitlines()[0].rstrip('.') if cause else 'MemoryError'}.",
        f"planned for this stage: {_gib(planned.total)} ({_parts(planned)}). {used}",
        f"What each remedy would make of the fullest stage, planned at {_gib(now)} now:",
    ]
    found = remedies(run, is_cpu=is_cpu)
    lines += [f"  {one.changes}: {_gib(one.peak_bytes)}, saves {_gib(now - one.peak_bytes)}" for one in found]
    return "\n".join(lines if found else [*lines[:2], "No single change of depths, recomputation or sizes helps."])


def remedies(run: ResolvedRun, *, is_cpu: bool) -> list[Remedy]:
    """Single changes that lower the planned peak of the fullest stage, the best first."""
    cfg, world_size, now = run.cfg, run.world_size, peak_bytes(run, is_cpu=is_cpu)
    found = []
    for changes in _candidates(cfg):
        trial = cfg.copy()
        for name, value in changes.items():
            section, field = name.split(".")
            setattr(getattr(trial, section), field, value)
        _follow(trial, cfg)
        try:
            peak = peak_bytes(resolve(trial.finalize(world_size), world_size), is_cpu=is_cpu)
        except (ConfigError, PlanError):  # this model cannot have it
            continue
        if peak < now:
            found.append(Remedy(" ".join(f"{name}={_text(value)}" for name, value in changes.items()), peak))
    return sorted(found, key=lambda remedy: remedy.peak_bytes)


def peak_bytes(run: ResolvedRun, *, is_cpu: bool) -> int:
    """Planned peak of the fullest stage."""
    return MemoryModel(run, is_cpu).fullest_bytes(run.layout)


def _candidates(cfg: ConfigContainer) -> list[dict[str, Any]]:
    model, micro = cfg.model, cfg.train.micro_batch_size
    layout, depths = model.pipeline_model_parallel_layout, Depths.of(model).count
    # A split written for other depths or stages no longer fits: split evenly again.
    again = {} if layout in ("auto", "even") else {"model.pipeline_model_parallel_layout": "even"}
    fewer = sorted({depths - 1, 0}, reverse=True) if depths else []
    found: list[dict[str, Any]] = [{"model.mtp_num_layers": count} | again for count in fewer]
    if model.recompute_granularity is None:
        modules = ["layernorm", "moe" if model.num_moe_experts else "mlp"]
        modules += ["mla_up_proj"] if model.multi_latent_attention else []
        found.append({"model.recompute_granularity": "selective", "model.recompute_modules": modules})
    if model.recompute_granularity != "full":
        full = {"granularity": "full", "method": "uniform", "num_layers": 1}
        found.append({f"model.recompute_{name}": value for name, value in full.items()})
    if not cfg.ddp.use_distributed_optimizer:
        found.append({"ddp.use_distributed_optimizer": True})
    found.append({"model.pipeline_model_parallel_size": 2 * model.pipeline_model_parallel_size} | again)
    if micro > 1:
        found.append({"train.micro_batch_size": max(size for size in range(1, micro) if micro % size == 0)})
    return found


def _follow(trial: ConfigContainer, cfg: ConfigContainer) -> None:
    """Adjusts fields of `trial` that were derived from a field that has changed."""
    model = trial.model
    if model.mtp_depth_weights:
        model.mtp_depth_weights = model.mtp_depth_weights[: model.mtp_num_layers] or None
    if model.recompute_granularity == "full":
        model.recompute_modules = None
    if trial.validation.eval_micro_batch_size == cfg.train.micro_batch_size:
        trial.validation.eval_micro_batch_size = trial.train.micro_batch_size


def _used_on_gpu() -> str:
    free, total = torch.cuda.mem_get_info()
    return (
        f"Used: {_gib(torch.cuda.max_memory_allocated())} by tensors at most, "
        f"{_gib(torch.cuda.memory_reserved())} kept by the allocator; {_gib(total)} on the device, {_gib(free)} free."
    )


def _used_on_cpu() -> str:
    memory, limits = psutil.virtual_memory(), memory_limits()
    used = f"Used: {_gib(peak_resident_bytes())} by this process at most, libraries included; "
    if not limits:
        return f"{used}{_gib(memory.total)} on this machine, {_gib(memory.available)} free for all its processes."
    set_here = ", ".join(f"{_gib(one.limit_bytes)} for the {one.name}, {_gib(one.used_bytes)} in use" for one in limits)
    return (
        f"{used}limited to {set_here}, which may be less than the machine has free ({_gib(memory.available)} of "
        f"{_gib(memory.total)})."
    )


def _parts(memory: RankMemory) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(memory).items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _text(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
