"""metrics.jsonl, one JSON object per line: its writer, and a reader that returns one curve per run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


class JsonlSink:
    """Appends records to a file. Each line has `kind`, `iteration`, `time` (seconds since 1970) and its own fields.

    A run writes `start` first. When a run resumes at iteration n, the lines of later iterations stay in the file; its
    `start` record tells readers to drop them. A `rollback` record does the same within a run.

    Args:
        path: the file; its folder is created.
        iteration: training steps done before this process.
        run: content of the `start` record.
    """

    def __init__(self, path: Path, iteration: int, run: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        broken_tail = _ends_within_a_line(path)
        self._file = path.open("a", encoding="utf-8")
        if broken_tail:
            self._file.write("\n")
        self._write("start", iteration, run)

    def step(self, iteration: int, metrics: dict[str, float]) -> None:
        """Writes one `step` record."""
        self._write("step", iteration, metrics)

    def evaluation(self, name: str, iteration: int, metrics: dict[str, float]) -> None:
        """Writes one `evaluation` record, with the name of the validation set."""
        self._write("evaluation", iteration, {"name": name, **metrics})

    def message(self, kind: str, iteration: int, text: str, fields: Mapping[str, Any] = NO_FIELDS) -> None:
        """Writes a line of text of the given kind, with other fields."""
        self._write(kind, iteration, {"text": text, **fields})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, kind: str, iteration: int, fields: dict[str, Any]) -> None:
        line = {"kind": kind, "iteration": iteration, "time": round(time.time(), 3)} | _strict(fields)
        self._file.write(json.dumps(line, default=str, allow_nan=False) + "\n")
        # A crash must not lose the last steps.
        self._file.flush()


def read_metrics(path: str | Path, kind: str = "step", name: str | None = None) -> list[dict[str, Any]]:
    """Reads the records of one kind as one curve, however often the run was resumed.

    Lines of steps that a resumed run repeated are dropped, and so is an incomplete last line. NaN and infinities are
    returned as floats.

    Args:
        path: metrics.jsonl.
        kind: `step`, `evaluation`, `warning`, `recovery`, `fault`, `phase`, `message`, `start`, `start card` or `end`.
        name: with `evaluation`, only this validation set.

    Returns:
        `step` and `evaluation`: the last record of each iteration (and name) in ascending order; other kinds: all lines
        that were not dropped.
    """
    kept: list[dict[str, Any]] = []
    for line in _lines(Path(path)):
        if line["kind"] in ("start", "rollback"):
            kept = [old for old in kept if not is_dropped(old, line)]
        kept.append(line)
    kept = [line for line in kept if line["kind"] == kind and (name is None or line.get("name") == name)]
    if kind not in ("step", "evaluation"):
        return kept
    last = {(line["iteration"], line.get("name", "")): line for line in kept}
    return sorted(last.values(), key=lambda line: line["iteration"])


def is_dropped(old: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether the `start` or `rollback` record `line` makes an earlier record void.

    A run that starts at n repeats everything after n; what it writes at n (an evaluation) is new as well. A fresh run
    drops all. A fault stays after the rollback that it caused: the batch is skipped, so it is not reported again. A
    phase that began at n begins there again with a start, and not with a rollback.
    """
    if line["kind"] == "start" and line["iteration"] == 0:
        return True
    if old["kind"] == "phase" and line["kind"] == "start":
        return bool(old["iteration"] >= line["iteration"])
    return old["iteration"] > line["iteration"] and not (line["kind"] == "rollback" and old["kind"] == "fault")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by a crash
        yield finite_or_float(line)


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


# JSON has no NaN and many readers refuse the bare word, so it is written as a string.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def finite_or_float(line: dict[str, Any]) -> dict[str, Any]:
    """A record with NaN and infinities as floats."""
    return {key: _number(value) for key, value in line.items()}


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
