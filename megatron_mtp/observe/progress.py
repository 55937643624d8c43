"""The progress bar of a training run, with the time left."""

from __future__ import annotations

import atexit
import sys

from megatron_mtp.observe.metrics import StepRecord


class ProgressBar:
    """One line at the bottom of the terminal; whatever else is printed meanwhile scrolls by above it.

    Args:
        iteration: steps done before this process.
        train_iters: steps of the whole run; None where the run ends by something else, then no time left is shown.
    """

    def __init__(self, iteration: int, train_iters: int | None, force: bool = False):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Steps differ in length (evaluation, saving): the estimate looks back over a minute or more.
            TimeRemainingColumn(),
            console=Console(force_terminal=True if force else None),
            # The bar redraws on each step; a fast refresh would take CPU from training on small machines.
            refresh_per_second=2,
            speed_estimate_period=120.0,
        )
        self._task = self._bar.add_task("training", total=train_iters, completed=iteration, figures="")
        self._bar.start()
        # The bar hides the cursor and replaces sys.stdout and sys.stderr; an error elsewhere must not leave it so.
        atexit.register(self.close)

    def update(self, record: StepRecord) -> None:
        """Moves the bar to the record's step."""
        figures = "  ".join(
            f"{name.removesuffix(' loss')} {value:.3f}" for name, value in _token_losses(record).items()
        )
        self._bar.update(self._task, completed=record.iteration, total=record.train_iters, figures=figures)

    def print(self, line: str) -> None:
        """Prints a line above the bar, whole: plain `print` works as well, but is broken at the terminal's width."""
        self._bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar; may be called twice."""
        self._bar.stop()
        atexit.unregister(self.close)


def wanted(setting: bool | None) -> bool:
    """Whether a bar is shown: as set, or only in a terminal."""
    return sys.stdout.isatty() if setting is None else setting


def _token_losses(record: StepRecord) -> dict[str, float]:
    return {name: value for name, value in record.losses.items() if name == "lm loss" or name.startswith("mtp_")}
