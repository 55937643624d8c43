"""torch.profiler over a range of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, Resume, knob


@dataclass(kw_only=True, slots=True)
class ProfilingConfig(Section):
    """torch.profiler over a range of steps."""

    SECTION: ClassVar[str] = "profiling"
    RESUME: ClassVar[Resume] = "free"

    use_pytorch_profiler: bool = False
    """Write a trace with ranges by stage, depth and phase, for TensorBoard or Perfetto."""
    profile_step_start: int = knob(10, ge=0, le=MAX_STEPS)
    """Steps of the run that are done before the trace."""
    profile_step_end: int = knob(12, ge=1, le=MAX_STEPS)
    """Steps of the run that are done when the trace ends."""
    profile_ranks: list[int] = knob([0], ge=0, le=10_000_000)
    """Ranks that write a trace."""
    profile_dir: str | None = knob(None, is_path=True, is_written=True)
    """Folder of the traces; required with use_pytorch_profiler."""
