"""Checks one node of a job before ranks start on it: GPUs, disk, and the files that the run reads and writes.

Nodes check themselves alone. What they can only compare with each other, versions, clocks and links, the ranks check
before the first step (`training/guards/node_check.py`).
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.paths import RunPath, run_paths
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import ConfigError, NodeError, Problem
from megatron_mtp.observe.env import package_versions
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.storage.address import is_address
from megatron_mtp.storage.place import place, try_writing

MIN_SCRATCH_GIB = 1.0
"""Free space that temporary files, and the memory that ranks of a node share, need at least."""
MAX_USED_SHARE = 0.1
"""A GPU of which more than this share is in use belongs to another process; this one's context takes half a GiB."""
SLOW_SHARE = 0.7
"""A GPU that copies at less than this share of the median speed of its node is named."""
PROBE_BYTES = 1 << 30


@dataclass(slots=True)
class NodeReport:
    """What was found on one node.

    Attributes:
        facts: one line each.
        faults: of the machine; another one may be fit.
        mistakes: of the user; every machine would meet them.
    """

    facts: list[str] = field(default_factory=list)
    faults: list[Problem] = field(default_factory=list)
    mistakes: list[Problem] = field(default_factory=list)


def node_name() -> str:
    """The name under which the scheduler knows this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def examine_node(gpus: int, cfg: ConfigContainer | None = None) -> NodeReport:
    """Checks this machine as a node of a job.

    Args:
        gpus: that the job uses here; 0: none.
        cfg: of the run, finalized; None: only the machine is checked.
    """
    report = NodeReport([f"clock {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC"])
    report.facts += [f"{name} {version}" for name, version in package_versions().items()]
    _check_scratch(report, shares_memory=gpus > 1)
    if gpus:
        _check_gpus(report, gpus)
    if cfg is not None:
        paths = {path.path: path for path in reversed(run_paths(cfg))}  # one field of several that name it
        report.mistakes += [problem for path in reversed(paths.values()) for problem in path_problems(path)]
        report.mistakes += [] if report.mistakes else _space_problems(cfg)
    return report


def fail_if_unfit(report: NodeReport) -> None:
    """Raises what a report found.

    Raises:
        NodeError: the machine is not fit for the job.
        ConfigError: the job would fail on every machine.
    """
    if report.faults:
        raise NodeError(report.faults).within(node_name())
    if report.mistakes:
        raise ConfigError(report.mistakes).within(node_name())


def _check_scratch(report: NodeReport, *, shares_memory: bool) -> None:
    for folder in [tempfile.gettempdir(), *(["/dev/shm"] if shares_memory else [])]:
        free_gib = shutil.disk_usage(folder).free / GIB if os.path.isdir(folder) else 0.0
        report.facts.append(f"{free_gib:.1f} GiB free in {folder}")
        if free_gib < MIN_SCRATCH_GIB:
            rule = f"{free_gib:.2f} GiB are free; a node needs {MIN_SCRATCH_GIB:g}"
            report.faults.append(Problem(fields=(folder,), rule=rule))


def _check_gpus(report: NodeReport, wanted: int) -> None:
    import torch

    count = torch.cuda.device_count()
    if count < wanted:
        rule = f"torch sees {count}, the job needs {wanted}"
        remedy = (
            "Leave this node out (Slurm: --sbatch exclude=NODE), or have it repaired; `megatron-mtp doctor` says more."
        )
        report.faults.append(Problem(fields=("GPUs",), rule=rule, remedy=remedy))
    speeds: dict[int, float] = {}
    for index in range(min(count, wanted)):
        try:
            free, total = torch.cuda.mem_get_info(index)
            if total - free > MAX_USED_SHARE * total:
                rule = f"another process holds {(total - free) / GIB:.1f} of its {total / GIB:.1f} GiB"
                report.faults.append(Problem(fields=(f"GPU {index}",), rule=rule))
                continue
            speeds[index] = _copy_gb_per_s(index)
        except RuntimeError as error:  # whatever CUDA says of a broken device
            report.faults.append(Problem(fields=(f"GPU {index}",), rule=str(error).partition("\n")[0]))
    report.facts += speed_lines(speeds)


def _copy_gb_per_s(index: int) -> float:
    """Bytes read and written per second by a copy within the memory of a GPU; the best of three."""
    import torch

    source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    target, best_ms = torch.empty_like(source), float("inf")
    with torch.cuda.device(index):
        for _ in range(4):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            best_ms = min(best_ms, begin.elapsed_time(end))
    return 2 * PROBE_BYTES / best_ms / 1e6


def speed_lines(speeds: dict[int, float]) -> list[str]:
    """The median speed of the GPUs of a node, and those that are far below it.

    Args:
        speeds: GB/s by GPU.
    """
    if not speeds:
        return []
    median = statistics.median(speeds.values())
    slow = [
        f"slow GPU {index}: copies {speed:.0f} GB/s" for index, speed in speeds.items() if speed < SLOW_SHARE * median
    ]
    return [f"{len(speeds)} GPUs copy {median:.0f} GB/s (median)", *slow]


def path_problems(path: RunPath) -> Iterator[Problem]:
    """What is wrong with a path of the config on this machine."""
    if not path.is_written:
        for missing in path.missing()[:1]:
            yield Problem(fields=(path.field,), value=path.path, rule=f"there is no {missing} here")
        return
    folder = place(path.path) if is_address(path.path) else _existing(path.path)
    try:
        try_writing(folder)
    except OSError as error:
        yield Problem(fields=(path.field,), value=path.path, rule=f"{folder} cannot be written ({error.strerror})")


def _existing(path: str) -> Path:
    """The innermost folder of `path` that exists."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _space_problems(cfg: ConfigContainer) -> Sequence[Problem]:
    save, needed = cfg.checkpoint.save, checkpoint_bytes(cfg)
    if save is None or is_address(save) or (free := shutil.disk_usage(_existing(save)).free) >= needed:
        return []
    rule = f"{free / GIB:.1f} GiB are free there, and one checkpoint takes {needed / GIB:.1f}"
    return [Problem(fields=("checkpoint.save",), value=save, rule=rule, remedy="Make room, or choose another folder.")]


def checkpoint_bytes(cfg: ConfigContainer) -> int:
    """Size of the tensors of one checkpoint: weights, and with Adam two moments and an fp32 copy. 0: not known.

    Args:
        cfg: finalized. Without model.vocab_size, which the tokenizer may give later, the size is not known.
    """
    if not cfg.model.vocab_size:
        return 0
    is_half = cfg.precision.dtype != "fp32"
    has_copy = is_half or cfg.ddp.use_distributed_optimizer
    adam = (12 if has_copy else 8) if cfg.checkpoint.save_optim and cfg.optimizer.optimizer == "adam" else 0
    return count_parameters(cfg.model).total * ((2 if is_half else 4) + adam)
