"""torch.profiler over a range of steps."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ProfilingConfig
from megatron_mtp.training.callbacks.base import ConfiguredCallback
from megatron_mtp.training.callbacks.ranges import Ranges
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult


class Profiler(ConfiguredCallback):
    """Writes a trace of the configured steps on the configured ranks, for TensorBoard or Perfetto; see `ranges`."""

    def __init__(self, options: ProfilingConfig):
        self._options = options
        self._profile: torch.profiler.profile | None = None
        self._ranges: Ranges | None = None

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> Profiler | None:
        """Asked for by profiling.use_pytorch_profiler."""
        return cls(cfg.profiling) if cfg.profiling.use_pytorch_profiler else None

    def on_train_start(self, run: Run, state: TrainState) -> None:
        """Starts the profiler's own count of steps, where this rank is to be profiled and the steps are to come.

        A trace ends with a phase, and another one begins where steps are left.
        """
        self.close()
        options, rank, done = self._options, dist.get_rank(), state.iteration
        if rank not in options.profile_ranks or done >= options.profile_step_end:
            return
        before = max(options.profile_step_start - done, 0)
        self._profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=max(before - 1, 0),
                warmup=1 if before else 0,
                active=options.profile_step_end - max(options.profile_step_start, done),
                repeat=1,
            ),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(
                filled(options.profile_dir), worker_name=f"rank{rank}"
            ),
        )
        self._ranges = Ranges(run)
        self._profile.start()

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """Moves the profiler's schedule on; after the last step of the trace nothing is marked any more."""
        if self._profile is not None:
            self._profile.step()
        if self._ranges is not None and state.iteration >= self._options.profile_step_end:
            self._ranges.close()

    def close(self) -> None:
        """Stops the profiler; a trace that is not complete is still written."""
        if self._ranges is not None:
            self._ranges.close()
        if self._profile is not None:
            self._profile.stop()
        self._ranges = self._profile = None
