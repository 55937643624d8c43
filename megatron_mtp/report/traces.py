"""The schedule of one step as it was measured: read from the profiler's traces of one rank of each stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_mtp.parallel.planner.simulate import Event

CALL = re.compile(r"stage (\d+) chunk (\d+) (forward|backward), micro-batch (\d+)")
"""Ranges of `training.callbacks.ranges`."""
MOST_BYTES = 256 * 2**20
"""A larger trace is not read: the report would take minutes."""


def measured_step(folder: Path) -> tuple[Event, ...]:
    """The calls of all traced stages in the last step of the traces, from 0 ms on; empty if there are none."""
    stages: dict[int, list[Event]] = {}
    for path in sorted(folder.glob("rank*.pt.trace.json")):
        if path.stat().st_size > MOST_BYTES:
            continue
        events = _last_step(path)
        if events:
            stages[events[0].pp_rank] = events  # of a later start, if the run was profiled twice
    found = [event for events in stages.values() for event in events]
    start_ms = min((event.start_ms for event in found), default=0.0)
    return tuple(
        Event(e.pp_rank, e.vp_rank, e.micro_batch, e.is_forward, e.start_ms - start_ms, e.end_ms - start_ms)
        for e in found
    )


def _last_step(path: Path) -> list[Event]:
    try:
        trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # being written, or cut off
    base_ms = trace.get("baseTimeNanoseconds", 0) / 1e6
    for kind in ("gpu_user_annotation", "user_annotation"):  # on a GPU the CPU's ranges are the launches
        calls: dict[tuple[str, ...], list[Event]] = {}
        for one in trace.get("traceEvents", []):
            if one.get("cat") != kind or (match := CALL.fullmatch(one.get("name", ""))) is None:
                continue
            start_ms = base_ms + one["ts"] / 1e3
            stage, chunk, phase, micro_batch = match.groups()
            call = Event(
                int(stage), int(chunk), int(micro_batch), phase == "forward", start_ms, start_ms + one["dur"] / 1e3
            )
            calls.setdefault(match.groups(), []).append(call)
        if calls:  # every step makes each call once
            return [max(times, key=lambda call: call.start_ms) for times in calls.values()]
    return []
