"""Processes and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_mtp.config.base import Section

Hardware = Literal["h100", "h200", "h800", "h20", "b200", "gb200", "a100", "l40s", "mi300x", "cpu"]
"""Devices of parallel/planner/machines.py."""


@dataclass(kw_only=True, slots=True)
class DistConfig(Section):
    """Processes and devices."""

    SECTION: ClassVar[str] = "dist"

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where a GPU is present."""
    hardware: Hardware | dict[str, Any] | None = None
    """Device that the planner estimates times and memory for, where model.pipeline_model_parallel_layout is "auto" and in `megatron-mtp plan`; None: cpu with device=cpu, else h100."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer ends the job."""
    watchdog_s: float | None = None
    """A rank without progress for this long ends the job, with the stack of every rank; None: nine tenths of distributed_timeout_minutes; 0: off."""
    node_check: bool = True
    """Before the first step: versions equal, checkpoint folder shared, bandwidth between ranks."""
    straggler_factor: float = 1.5
    """Ranks whose own work takes this many times the median are named in the log; 0: off."""
    preempted_exit_code: int = 3
    """Exit code after SIGTERM and its checkpoint; launchers start such a job again."""
    preemption_grace_s: int = 300
    """Seconds that launchers leave between SIGTERM and SIGKILL; the scripts of `megatron-mtp launch` are made with it."""
    use_tp_pp_dp_mapping: bool = False
    """Rank order tp-cp-ep-pp-dp in place of tp-cp-ep-dp-pp."""
    num_threads: int | None = None
    """CPU threads of each rank; None: cores divided by local ranks on a CPU, torch's choice on a GPU."""
