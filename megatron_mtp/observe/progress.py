"""Progress of long work: the bar of a training run, and lines about work in parts, both with the remaining time."""

from __future__ import annotations

import atexit
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

from megatron_mtp.observe.metrics import StepRecord, token_losses


class ProgressBar:
    """One line at the bottom of the terminal; other output scrolls above it.

    Args:
        iteration: steps done before this process.
        train_iters: steps of the complete run; None: unknown, so no remaining time is shown.
        force: show the bar even if stdout is not a terminal.
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
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Steps differ in length (evaluation, saving): the estimate looks back over a minute or more.
            TimeRemainingColumn(),
            console=Console(force_terminal=True if force else None),
            # The bar redraws on each step; a fast refresh would take CPU from training on small machines.
            refresh_per_second=2,
            speed_estimate_period=120.0,
        )
        self._task = self._bar.add_task("training", total=train_iters, completed=iteration, losses="")
        self._bar.start()
        # The bar hides the cursor and replaces sys.stdout and sys.stderr; an error elsewhere must not leave it so.
        atexit.register(self.close)

    def update(self, record: StepRecord) -> None:
        """Moves the bar to the record's step."""
        token = token_losses(record.losses)
        losses = "  ".join(f"{name.removesuffix(' loss')} {loss:.3f}" for name, loss in token.items())
        self._bar.update(self._task, completed=record.iteration, total=record.train_iters, losses=losses)

    def print(self, line: str) -> None:
        """Prints a line above the bar without breaking it at the terminal's width, which plain `print` would do."""
        self._bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar; may be called twice."""
        self._bar.stop()
        atexit.unregister(self.close)


def wanted(setting: bool | None) -> bool:
    """Whether to show a bar: as set; None: only in a terminal."""
    return sys.stdout.isatty() if setting is None else setting


@dataclass(slots=True)
class Pace:
    """Lines about work in parts that takes longer than some seconds.

    Args:
        name: of the work.
        unit: plural of the parts.
        total: number of parts.
        first_s, every_s: seconds until the first line, and between lines.
    """

    name: str
    unit: str
    total: int
    first_s: float = 10.0
    every_s: float = 60.0
    _started: float = field(default_factory=lambda: time.monotonic())
    _last: float | None = None

    def line(self, done: int) -> str | None:
        """The line that is due when `done` parts are done; None: there is none.

        Example: `evaluation of docs: 120 of 1,000 batches, about 0:07:20 left`
        """
        now = time.monotonic()
        elapsed_s = now - self._started
        if done == 0 or (elapsed_s < self.first_s if self._last is None else now - self._last < self.every_s):
            return None
        self._last = now
        left = timedelta(seconds=round(elapsed_s / done * (self.total - done)))
        return f"{self.name}: {done:,} of {self.total:,} {self.unit}, about {left} left"
