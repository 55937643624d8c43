"""Plots the loss of every depth over the steps of a run."""

from __future__ import annotations

from pathlib import Path

from megatron_mtp.observe.jsonl import read_metrics

SMOOTH_STEPS = 10


def plot_losses(metrics: Path, picture: Path) -> Path:
    """Draws training losses (a running mean) as lines and held-out losses as points.

    Args:
        metrics: metrics.jsonl of a run.
        picture: file to write, .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, evaluations = read_metrics(metrics), read_metrics(metrics, "evaluation", "validation")
    names = ["lm loss", *sorted(name for name in steps[-1] if name.startswith("mtp_") and name.endswith(" loss"))]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, name in enumerate(names):
        color = f"C{index}"
        axes.plot([s["iteration"] for s in steps], _smooth([s[name] for s in steps]), color=color, label=name)
        points = [(e["iteration"], e[name]) for e in evaluations if name in e]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{name}, held out")
    axes.set(xlabel="iteration", ylabel="nats per token")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def _smooth(values: list[float]) -> list[float]:
    """Mean of each value and the SMOOTH_STEPS - 1 before it."""
    return [sum(values[max(0, i - SMOOTH_STEPS + 1) : i + 1]) / min(i + 1, SMOOTH_STEPS) for i in range(len(values))]
