"""Condenses a report that comes again at nearly every step into few lines."""

from __future__ import annotations

from dataclasses import dataclass

QUIET_STEPS = 10
"""A series of reports is over after this many steps without one."""


@dataclass(slots=True)
class Repeats:
    """Chooses what is shown of a series of reports: the first, the 10th, 100th and so on, and a summary at its end."""

    first: int = 0
    last: int = 0
    count: int = 0

    def add(self, iteration: int, text: str) -> str | None:
        """The line to show for the report of this step; None: it is only counted."""
        if self.count == 0:
            self.first = iteration
        self.count, self.last = self.count + 1, iteration
        if self.count == 1:
            return text
        if self.count != 10 ** (len(str(self.count)) - 1):
            return None
        return f"{text} The {self.count}th such step since iteration {self.first}."

    def quiet(self, iteration: int) -> str | None:
        """Called after a step without a report: the summary of a series that is over by now."""
        return self.end() if self.count and iteration - self.last >= QUIET_STEPS else None

    def end(self) -> str | None:
        """Ends the series. Returns its summary, unless it is empty or was one report, which has been shown."""
        count, self.count = self.count, 0
        if count < 2:
            return None
        return (
            f"iterations {self.first} to {self.last}: {count} steps were reported like that of iteration {self.first}"
        )
