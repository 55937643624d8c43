"""Processes and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import YEAR_MINUTES, Resume, knob


@dataclass(kw_only=True, slots=True)
class DistConfig(Section):
    """Processes and devices."""

    SECTION: ClassVar[str] = "dist"
    RESUME: ClassVar[Resume] = "free"

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where a GPU is present."""
    hardware: str | dict[str, Any] | None = None
    """Device that the planner estimates times and memory for: its name in config/machines.py, or a mapping of a `base`
    and the fields that differ. Used where model.pipeline_model_parallel_layout is "auto" and in `megatron-mtp plan`.
    None: cpu with device=cpu, else h100."""
    distributed_timeout_minutes: float = knob(10.0, gt=0, le=YEAR_MINUTES)
    """A collective that waits for more minutes ends the job."""
    watchdog_s: float | None = knob(None, ge=0, le=60 * YEAR_MINUTES)
    """A rank without progress for this many seconds ends the job, and the stack of every rank is logged. None: nine
    tenths of distributed_timeout_minutes, 540 by default; 0: off."""
    node_check: bool = True
    """Before ranks start in a job of `megatron-mtp launch`: GPUs, disk and files of each node. Before the first step:
    versions equal, checkpoint folder shared; links and clocks are measured."""
    straggler_factor: float = knob(1.5, ge=0, le=1e6)
    """Ranks whose own work takes more than this multiple of the median are named in the log; 0: off."""
    preempted_exit_code: int = knob(3, ge=1, le=125)
    """Exit code after SIGTERM and its checkpoint, on which launchers restart the job."""
    preemption_grace_s: int = knob(300, ge=1, le=86_400)
    """Seconds between SIGTERM and SIGKILL, 5 minutes by default; `megatron-mtp launch` writes it into the scripts."""
    use_tp_pp_dp_mapping: bool = knob(False, phase="free")
    """Rank order tp-cp-ep-pp-dp in place of tp-cp-ep-dp-pp."""
    num_threads: int | None = knob(None, ge=1, le=10_000)
    """CPU threads of each rank; None: cores divided by local ranks on a CPU, torch's choice on a GPU."""
