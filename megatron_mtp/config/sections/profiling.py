"""torch.profiler over a range of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class ProfilingConfig(Section):
    """torch.profiler over a range of steps."""

    SECTION: ClassVar[str] = "profiling"

    use_pytorch_profiler: bool = False
    """Write a trace for TensorBoard or Perfetto."""
    profile_step_start: int = 10
    """First step of the trace."""
    profile_step_end: int = 12
    """Step after the last of the trace."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one."""
    profile_dir: str | None = None
    """Folder of the traces; needed with use_pytorch_profiler."""
