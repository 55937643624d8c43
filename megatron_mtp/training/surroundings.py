"""What stands around the steps of the loop: Python's garbage collector, and torch.profiler."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def manual_gc(enabled: bool) -> Iterator[None]:
    """Python's collector runs at the same steps on every rank: one that pauses alone makes all others wait."""
    if not enabled:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _NoProfiler:
    def step(self) -> None:
        pass


@contextmanager
def profiler(cfg: Any) -> Iterator[Any]:
    """torch.profiler over the configured steps on the configured ranks."""
    options = cfg.profiling
    if not options.use_pytorch_profiler or dist.get_rank() not in options.profile_ranks:
        yield _NoProfiler()
        return
    schedule = torch.profiler.schedule(
        wait=max(options.profile_step_start - 1, 0),
        warmup=1 if options.profile_step_start > 0 else 0,
        active=options.profile_step_end - options.profile_step_start,
        repeat=1,
    )
    handler = torch.profiler.tensorboard_trace_handler(options.profile_dir, worker_name=f"rank{dist.get_rank()}")
    with torch.profiler.profile(schedule=schedule, on_trace_ready=handler) as running:
        yield running
