"""Draws the schedule of a plan as SVG: ranks from top to bottom, time from left to right."""

from __future__ import annotations

from dataclasses import replace
from html import escape

from megatron_mtp.parallel.planner.part_costs import PartTime
from megatron_mtp.parallel.planner.planner import Plan, Planner
from megatron_mtp.parallel.planner.simulate import Event, Timeline, simulate
from megatron_mtp.parallel.planner.split import Split, SplitProblem

WIDTH, LEFT, TOP, ROW, GAP = 1400, 128, 78, 26, 6
COLOURS = {"embedding": "#8a8a8a", "forward": "#4c86c6", "backward": "#9fc46b", "mtp": "#e8963c", "loss": "#c2477f"}
NAMES = {"forward": "decoder forward", "backward": "decoder backward", "mtp": "MTP layers", "loss": "head and loss"}
MOST_ROUNDS = 2
"""Rounds of pp micro-batches that are drawn; the beginning and the end of a longer step look the same."""


def draw(planner: Planner, plan: Plan, title: str) -> str:
    """The schedule of a plan as SVG text.

    A step of many micro-batches is drawn as a short one. The parts of a backward call are drawn in the order in which
    they run: head and loss, then MTP layers, then decoder layers.
    """
    layout, problem = plan.layout, planner.problem()
    count = min(plan.num_microbatches, MOST_ROUNDS * layout.pp)
    line = simulate(replace(problem.kind, num_microbatches=count), problem.work(Split.of(layout)))
    parts = [[_parts(problem, layout.chunks[p][v]) for v in range(layout.vp)] for p in range(layout.pp)]
    scale = (WIDTH - LEFT - 24) / line.total_ms
    height = TOP + layout.pp * (ROW + GAP) + 44
    note = "" if count == plan.num_microbatches else f", drawn with {count} of {plan.num_microbatches} micro-batches"
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="16" font-weight="bold" fill="#222222">{escape(title)}: '
        f"pipeline schedule{note}</text>",
        *_legend(),
    ]
    for p in range(layout.pp):
        y = TOP + p * (ROW + GAP)
        body.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 24}" height="{ROW}" fill="#f1f1f1"/>')
        body.append(
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end" fill="#222222">'
            f"stage {p} ({plan.stages[p].idle:.0%} idle)</text>"
        )
    for event in line.events:
        body += _call(event, parts[event.pp_rank][event.vp_rank], scale)
    body += [*_axis(line, scale, height), "</svg>"]
    return "\n".join(body) + "\n"


def _parts(problem: SplitProblem, symbols: tuple[str, ...]) -> dict[str, PartTime]:
    """Time of what a chunk holds in addition to decoder layers, by colour."""
    parts = {"E": ("embedding", problem.embedding), "m": ("mtp", problem.mtp), "L": ("loss", problem.loss)}
    return dict(part for symbol, part in parts.items() if symbol in symbols)


def _call(event: Event, parts: dict[str, PartTime], scale: float) -> list[str]:
    """One call as a row of boxes in a frame, with the number of its micro-batch if there is room."""
    y = TOP + event.pp_rank * (ROW + GAP)
    middle = "forward" if event.is_forward else "backward"
    times = {name: time.forward_ms if event.is_forward else time.backward_ms for name, time in parts.items()}
    times[middle] = event.end_ms - event.start_ms - sum(times.values())
    order = ("embedding", middle, "mtp", "loss")
    left = x = LEFT + event.start_ms * scale
    out = []
    for name in order if event.is_forward else reversed(order):
        width = times.get(name, 0.0) * scale
        if width > 0:
            faded = ' fill-opacity="0.62"' if not event.is_forward and name != "backward" else ""
            out.append(_box(x, y, width, ROW, f'fill="{COLOURS[name]}"{faded}'))
            x += width
    if event.vp_rank % 2:
        out.append(_box(left, y + ROW - 4, x - left, 4, 'fill="#222222" fill-opacity="0.35"'))
    out.append(_box(left, y, x - left, ROW, 'fill="none" stroke="#ffffff" stroke-width="1"'))
    if x - left > 15:
        out.append(
            f'<text x="{(left + x) / 2:.2f}" y="{y + 17}" text-anchor="middle" fill="#ffffff" font-size="11">'
            f"{event.micro_batch}</text>"
        )
    return out


def _box(x: float, y: int, width: float, height: int, style: str) -> str:
    return f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" {style}/>'


def _legend() -> list[str]:
    out, x = [], LEFT
    for part, colour in COLOURS.items():
        name = NAMES.get(part, part)
        out.append(f'<rect x="{x}" y="40" width="14" height="14" fill="{colour}"/>')
        out.append(f'<text x="{x + 20}" y="52" fill="#222222">{name}</text>')
        x += 34 + 7 * len(name)
    text = "lighter: backward; numbers: micro-batches; a dark foot: odd virtual stages; grey: idle"
    out.append(f'<text x="{x}" y="52" fill="#666666">{text}</text>')
    return out


def _axis(line: Timeline, scale: float, height: int) -> list[str]:
    """The time axis, below the ranks."""
    raw = line.total_ms / 8
    power = 10 ** (len(f"{raw:.0f}") - 1) if raw >= 1 else 0.1
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    out, tick = [], 0
    while tick * step <= line.total_ms:
        x = LEFT + tick * step * scale
        out.append(f'<line x1="{x:.2f}" y1="{height - 40}" x2="{x:.2f}" y2="{height - 34}" stroke="#666666"/>')
        out.append(f'<text x="{x:.2f}" y="{height - 20}" text-anchor="middle" fill="#444444">{tick * step:g} ms</text>')
        tick += 1
    return out
