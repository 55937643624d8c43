"""The log of a run as columns: read quickly, and read on while the run writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mtp.errors import DataError
from megatron_mtp.observe.jsonl import finite_or_float, is_dropped

BLOCK_LINES = 2000
"""Lines that are decoded at once: fewer calls, and bounded memory."""
Row = list[float]


@dataclass(frozen=True, slots=True)
class Block:
    """Steps that have the same metrics.

    Args:
        names: of the columns; the first is `iteration`.
        rows: one for each step.
    """

    names: tuple[str, ...]
    rows: np.ndarray  # [steps, names], fp64


@dataclass(frozen=True, slots=True)
class Interruption:
    """A start after the first one, or a rollback.

    Args:
        line: of the log.
        last: last step that was in the log before it; the steps after `line["iteration"]` are done again.
    """

    line: dict[str, Any]
    last: int

    @property
    def lost(self) -> int:
        """Steps that are done again."""
        return max(0, self.last - self.line["iteration"])


@dataclass(slots=True)
class RunLog:
    """A metrics.jsonl as far as it is written: one curve of each metric, however often the run was resumed.

    Attributes:
        path: of the file.
        first: the `start` line of the run's first process.
        start: that of its present one.
        interruptions: later starts and rollbacks, in order.
        evaluations: lines of kind `evaluation`, the last of each iteration and name, in order.
        texts: every other line: `warning`, `fault`, `message`, `start card` ...
    """

    path: Path
    first: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    interruptions: list[Interruption] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    _evaluations: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    _blocks: list[Block] = field(default_factory=list)
    _names: tuple[str, ...] = ()
    _rows: list[Row] = field(default_factory=list)
    _offset: int = 0
    _last: int = 0

    @property
    def place(self) -> Path:
        """The folder that a user knows the run by: logger.log_dir, or checkpoint.save."""
        name = self.path.name
        return self.path.parent if name == "metrics.jsonl" else self.path.with_name(name.removesuffix(".metrics.jsonl"))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """See the class."""
        return [line for _, line in sorted(self._evaluations.items())]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations whose record has the metric, ascending, and its values there, NaN and infinities included."""
        self._close_block()
        found = [block.rows[:, [0, block.names.index(name)]] for block in self._blocks if name in block.names]
        if not found:
            return np.empty(0), np.empty(0)
        rows = np.concatenate(found)
        if np.any(np.diff(rows[:, 0]) <= 0):  # two records of one step: the last counts
            order = np.argsort(rows[:, 0], kind="stable")
            rows = rows[order]
            rows = rows[np.append(np.diff(rows[:, 0]) > 0, True)]
        return rows[:, 0], rows[:, 1]

    def names(self) -> list[str]:
        """Every metric that some step has, in order of appearance."""
        self._close_block()
        return list(dict.fromkeys(name for block in self._blocks for name in block.names[2:]))

    def last(self) -> dict[str, float]:
        """The newest value of every metric of a step."""
        values: dict[str, float] = {}
        self._close_block()
        for block in self._blocks:
            if len(block.rows):
                values |= dict(zip(block.names, block.rows[-1].tolist(), strict=True))
        return values

    def update(self) -> bool:
        """Reads what was written since the last call. Returns whether that was anything."""
        size = self.path.stat().st_size
        if size < self._offset:  # the file was replaced
            self._clear()
            self._offset = 0
        if size == self._offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self._offset)
            *lines, tail = file.read().split(b"\n")
        self._offset = size - len(tail)
        # A line without its end is being written, or was cut off by a crash; complete JSON counts without it.
        if tail and decoded([tail]):
            lines.append(tail)
            self._offset = size
        for start in range(0, len(lines), BLOCK_LINES):
            for line in decoded(lines[start : start + BLOCK_LINES]):
                self._add(line)
        return bool(lines)

    def _add(self, line: dict[str, Any]) -> None:
        kind, iteration = line["kind"], line["iteration"]
        if kind == "step":
            del line["kind"]
            if (names := tuple(line)) != self._names:
                self._close_block()
                self._names = names
            self._rows.append(list(line.values()))
            self._last = iteration
            if len(self._rows) == BLOCK_LINES:
                self._close_block()
        elif kind in ("start", "rollback"):
            self._go_back(line)
        elif kind == "evaluation":
            self._evaluations[iteration, line["name"]] = finite_or_float(line)
        else:
            self.texts.append(line)

    def _go_back(self, line: dict[str, Any]) -> None:
        """Drops what a resumed run or a rollback does again."""
        self._close_block()
        iteration = line["iteration"]
        if line["kind"] == "start" and (iteration == 0 or not self.first):
            self._clear()
            self.first, self._last = line, iteration
        else:
            self.interruptions.append(Interruption(line, self._last))
            self._last = min(self._last, iteration)
            self._blocks = [Block(b.names, b.rows[b.rows[:, 0] <= iteration]) for b in self._blocks]
            self._evaluations = {at: old for at, old in self._evaluations.items() if at[0] <= iteration}
            self.texts = [old for old in self.texts if not is_dropped(old, line)]
        if line["kind"] == "start":
            self.start = line

    def _clear(self) -> None:
        self.first, self.start, self._last = {}, {}, 0
        for kept in (self.interruptions, self.texts, self._evaluations, self._blocks, self._rows):
            kept.clear()

    def _close_block(self) -> None:
        if self._rows:
            # numpy reads "NaN", "Infinity" and "-Infinity", as which JSON has to hold them.
            self._blocks.append(Block(self._names, np.array(self._rows, dtype=np.float64)))
            self._rows = []


def open_log(run: str | Path) -> RunLog:
    """The log of a run, read as far as it is written.

    Args:
        run: `logger.log_dir`, `checkpoint.save`, or the file itself.

    Raises:
        DataError: there is no such log, or it holds no record.
    """
    log = RunLog(find_log(Path(run)))
    try:
        log.update()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{log.path}: cannot be read: {error}.") from error
    return log


def find_log(run: Path) -> Path:
    """The metrics.jsonl of a run; see `open_log`."""
    beside = run.resolve().with_name(run.resolve().name + ".metrics.jsonl")
    for path in (run, run / "metrics.jsonl", beside):
        if path.is_file():
            return path
    raise DataError(
        f"{run}: there is no log of a run. Looked for {run / 'metrics.jsonl'} and {beside}. Name the folder that the "
        "run has as logger.log_dir or checkpoint.save, or the .jsonl file."
    )


def decoded(lines: list[bytes]) -> list[dict[str, Any]]:
    """The records of some lines, without those that a crash has cut off."""
    lines = [line for line in lines if line.strip()]
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")
        if len(records) != len(lines):
            raise ValueError("broken lines that are JSON together")
    except ValueError:
        records = [record for line in lines if (record := _decoded_line(line)) is not None]
    return [one for one in records if isinstance(one, dict) and "kind" in one and "iteration" in one]


def _decoded_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
