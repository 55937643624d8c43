"""The pipeline schedule of one step, as it was planned and as a trace has measured it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megatron_mtp.parallel.planner.part_costs import PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.simulate import Event, Work, simulate
from megatron_mtp.report.charts import ReportRun
from megatron_mtp.report.traces import measured_step

WIDTH, LEFT, ROW, GAP = 1000, 70, 24, 5
MOST_ROUNDS = 2
"""Rounds of pp micro-batches that are drawn; the beginning and the end of a longer step look the same."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with its caption."""

    caption: str
    svg: str


def schedules(runs: Sequence[ReportRun]) -> list[Picture]:
    """The planned schedule of each run that has several stages, and the measured one of each run with traces."""
    found = []
    for run in runs:
        plan = run.log.start.get("extra", {}).get("plan", {})
        if schedule := plan.get("schedule"):
            caption = f"{run.name}: schedule planned for {plan['machine']}"
            found.append(_planned(schedule, caption))
        folder = run.log.start.get("config", {}).get("profiling", {}).get("profile_dir")
        if folder and (events := measured_step(Path(folder))):
            caption = f"{run.name}: schedule measured in the last step of the traces in {folder}"
            stages = 1 + max(event.pp_rank for event in events)
            found.append(Picture(caption, draw(events, max(event.end_ms for event in events), stages, caption)))
    return found


def _planned(schedule: dict[str, Any], caption: str) -> Picture:
    work = Work(
        chunks=tuple(tuple(PartTime(*time) for time in stage) for stage in schedule["chunks_ms"]),
        message_ms=tuple(schedule["message_ms"]),
        shapes_ms=schedule["shapes_ms"],
    )
    count = min(schedule["num_microbatches"], MOST_ROUNDS * work.pp)
    line = simulate(
        ScheduleKind(pp=work.pp, vp=work.vp, num_microbatches=count, sends_block=schedule["sends_block"]), work
    )
    if count < schedule["num_microbatches"]:
        caption += f", drawn with {count} of {schedule['num_microbatches']} micro-batches"
    return Picture(caption, draw(line.events, line.total_ms, work.pp, caption))


def draw(events: Sequence[Event], total_ms: float, pp: int, caption: str) -> str:
    """A row for each stage, time from left to right; forward passes are blue, backward passes green."""
    scale, height = (WIDTH - LEFT - 10) / total_ms, pp * (ROW + GAP) + 34
    busy = [sum(e.end_ms - e.start_ms for e in events if e.pp_rank == p) / total_ms for p in range(pp)]
    text = "; ".join(f"stage {p} computes {share:.0%} of {total_ms:.4g} ms" for p, share in enumerate(busy))
    body = [
        f'<svg class="schedule" viewBox="0 0 {WIDTH} {height}" role="img" font-size="11" '
        f'aria-label="{escape(f"{caption}: {text}")}">'
    ]
    for p in range(pp):
        y = p * (ROW + GAP)
        body.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW}" fill="#8888" opacity="0.3"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 16}" text-anchor="end">{p}: {busy[p]:.0%}</text>')
    for event in events:
        x, y = LEFT + event.start_ms * scale, event.pp_rank * (ROW + GAP)
        width, fill = (event.end_ms - event.start_ms) * scale, "#3572b0" if event.is_forward else "#6f9d3f"
        opacity = 1 - 0.25 * (event.vp_rank % 2)
        body.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{fill}" opacity="{opacity}" '
            'stroke="#fff" stroke-width="0.5"/>'
        )
        if width > 14:
            body.append(
                f'<text x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle" style="fill:#fff">'
                f"{event.micro_batch}</text>"
            )
    y = pp * (ROW + GAP) + 14
    for part in range(5):
        x = LEFT + part * (WIDTH - LEFT - 10) / 4
        anchor = "end" if part == 4 else "middle"
        body.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{part * total_ms / 4:.4g} ms</text>')
    body.append(
        f'<text x="{LEFT}" y="{y + 16}">stage: share of the time in which it computes; blue forward, green backward, '
        "paler: odd virtual stages; grey idle; numbers are micro-batches</text></svg>"
    )
    return "\n".join(body)
