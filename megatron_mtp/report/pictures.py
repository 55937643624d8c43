"""The charts of a report as PNG files, for slides and papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mtp.report.charts import Chart, Series
from megatron_mtp.report.marks import shown_marks

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#8a8a00", "#444444")
DASHES = ("-", "--", ":", "-.")
MARK_COLORS = {
    "fault": "#d1242f",
    "sign": "#d1242f",
    "recovery": "#1a7f37",
    "rollback": "#bf8700",
    "restart": "#8250df",
    "phase": "#6e7781",
}


def draw_pictures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Writes KEY.png for each chart, over steps. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = []
    # One figure for all, with fixed margins: a layout engine draws each chart twice.
    figure, axes = plt.subplots(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.1, right=0.98, top=0.92, bottom=0.12)
    for chart in charts:
        axes.clear()
        for line in chart.series:
            _draw_line(axes, line)
        for run in dict.fromkeys(id(line.run) for line in chart.series):
            marks = next(line.run.marks for line in chart.series if id(line.run) == run)
            for mark in shown_marks(marks):
                style = "-" if mark.kind in ("fault", "sign") else "--"
                axes.axvline(mark.iteration, color=MARK_COLORS[mark.kind], linestyle=style, linewidth=0.8, alpha=0.7)
        axes.set(xlabel="step", ylabel=chart.plot.unit, title=chart.plot.title)
        axes.legend(fontsize="small", loc="best")
        axes.grid(alpha=0.3)
        path = folder / f"{chart.plot.key}.png"
        figure.savefig(path, dpi=120, pil_kwargs={"compress_level": 3})
        found.append(path)
    plt.close(figure)
    return found


def _draw_line(axes: Axes, line: Series) -> None:
    short, color = line.reduced, COLORS[line.color % len(COLORS)]
    if line.points:
        axes.plot(short.iteration, short.mean, "o", color=color, markerfacecolor="white", label=line.label)
        return
    axes.plot(
        short.iteration, short.mean, DASHES[line.dash % len(DASHES)], color=color, linewidth=1.4, label=line.label
    )
    axes.fill_between(short.iteration, short.low, short.high, color=color, alpha=0.2, linewidth=0)
    for step in short.bad[:200]:
        axes.plot(step, 0.97, "x", color=color, transform=axes.get_xaxis_transform())
