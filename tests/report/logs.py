"""Logs of runs for the tests of this folder, written line by line as a run writes them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

TOKENS = 64 * 128


def step(iteration: int, depths: int = 2, noise: float = 0.02, **changes: Any) -> dict[str, Any]:
    """One record of a step, as a run of `depths` MTP depths writes it."""
    draw = random.Random(f"{iteration}{changes}")
    main = 2 + 6 * math.exp(-iteration / 300) + draw.gauss(0, noise)
    metrics: dict[str, Any] = {
        "consumed-samples": 64 * iteration,
        "perf/iteration_time_ms": 200 + draw.gauss(0, 5),
        "learning-rate": 3e-4,
        "lm loss": main,
        **{f"mtp_{k} loss": main + 0.4 * k + draw.gauss(0, noise) for k in range(1, depths + 1)},
        "grad-norm": 1 + draw.gauss(0, 0.1),
        "skipped-iterations": 0,
        "nan-iterations": 0,
        "perf/tokens_per_s_per_device": 20480.0,
        "perf/tflops_per_device": 0.4096,
        "consumed-tokens": TOKENS * iteration,
        **{f"mtp_{k}/accepted": 0.6 / k for k in range(1, depths + 1)},
    }
    if depths:
        metrics |= {"mtp/accepted_length": 0.9, "mtp/loss_scaling_factor": 0.1}
    return metrics | changes


def as_written(value: Any) -> Any:
    """JSON has no NaN: a log holds it as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value


class LogWriter:
    """Writes the log of one run.

    Args:
        folder: of the run; the log is its metrics.jsonl.
        time_s: of the first line; each line is written a second after the one before.
    """

    def __init__(self, folder: Path, time_s: float = 1.7e9):
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._time_s = time_s

    def line(self, kind: str, iteration: int, **fields: Any) -> LogWriter:
        """One line."""
        self._time_s += 1
        content = {"kind": kind, "iteration": iteration, "time": self._time_s} | fields
        text = json.dumps({name: as_written(value) for name, value in content.items()}, allow_nan=False)
        with self.path.open("a") as file:
            file.write(text + "\n")
        return self

    def start(self, iteration: int = 0, **fields: Any) -> LogWriter:
        """A process begins."""
        known = {
            "recipe": "tiny",
            "train_iters": 100,
            "world_size": 2,
            "device": "cpu",
            "config": {"train": {"seed": 1}},
        }
        return self.line("start", iteration, **known | fields)

    def steps(self, first: int, last: int, depths: int = 2, **changes: Any) -> LogWriter:
        """Steps `first` to `last`."""
        for iteration in range(first, last + 1):
            self.line("step", iteration, **step(iteration, depths, **changes))
        return self

    def evaluation(self, iteration: int, name: str = "validation", **fields: Any) -> LogWriter:
        """An evaluation."""
        losses = {"lm loss": 3.0, "mtp_1 loss": 3.4, "mtp_2 loss": 3.8, "mtp_1/accepted": 0.5}
        return self.line("evaluation", iteration, name=name, **losses | fields)

    def cut(self, characters: int) -> LogWriter:
        """A crash while the last line is written."""
        self.path.write_bytes(self.path.read_bytes()[:-characters])
        return self

    def resume(self, iteration: int, **fields: Any) -> LogWriter:
        """Another process goes on, and ends a line that a crash has cut off, as `JsonlSink` does."""
        if self.path.read_bytes()[-1:] != b"\n":
            with self.path.open("a") as file:
                file.write("\n")
        return self.start(iteration, **fields)


def going_on(folder: Path) -> LogWriter:
    """A run in the middle, its last line half written."""
    return LogWriter(folder).start().steps(1, 40).evaluation(20).line("step", 41, **step(41)).cut(30)


def killed_and_resumed(folder: Path) -> LogWriter:
    """Killed in mid-line and resumed three times, with steps done again."""
    log = LogWriter(folder).start().steps(1, 30).cut(25)
    log.resume(20).steps(21, 50).evaluation(50)
    log.resume(40).steps(41, 45)
    return log.resume(45).steps(46, 100).evaluation(100).line("end", 100, text="complete")


def rolled_back(folder: Path) -> LogWriter:
    """A NaN, a rollback, and the steps again."""
    log = LogWriter(folder).start().steps(1, 30).evaluation(30)
    log.line("fault", 31, text="iteration 31: lm loss is nan (step of 64 samples). train.on_nan = rollback: rollback 1")
    log.line("rollback", 20, text="the run continues from iteration 20")
    return log.steps(21, 60, noise=0.01).line("end", 60, text="left: SIGTERM")


def other_layout(folder: Path) -> LogWriter:
    """Resumed on other processes with another split."""
    one = {"config": {"model": {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2}}}
    two = {"config": {"model": {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 1}}, "world_size": 4}
    log = LogWriter(folder).start(**one).steps(1, 50, **{"perf/peak_memory_gib_stage_0": 1.5})
    return log.resume(50, **two).steps(51, 100, **{f"perf/peak_memory_gib_stage_{p}": 1.0 + p for p in range(4)})


def not_finite(folder: Path) -> LogWriter:
    """NaN and infinities in some steps, and a depth that has no finite value."""
    log = LogWriter(folder).start().steps(1, 30, **{"mtp_2 loss": math.nan})
    log.line("step", 31, **step(31, **{"lm loss": math.nan, "mtp_2 loss": math.nan, "grad-norm": math.inf}))
    log.line("warning", 31, text="iteration 31: lm loss is nan. If it stays so, go back to the last good checkpoint")
    log.line("step", 32, **step(32, **{"lm loss": math.inf, "mtp_1 loss": -math.inf, "mtp_2 loss": math.nan}))
    return log.steps(33, 60, **{"mtp_2 loss": math.nan}).evaluation(60, **{"lm loss": math.nan})


def without_validation(folder: Path) -> LogWriter:
    """One depth, no validation, no MTP layers."""
    return LogWriter(folder).start(train_iters=None).steps(1, 25, depths=0)


def empty(folder: Path) -> LogWriter:
    """A run that has not done a step."""
    return LogWriter(folder).start()


LOGS = {
    function.__name__: function
    for function in (
        going_on,
        killed_and_resumed,
        rolled_back,
        other_layout,
        not_finite,
        without_validation,
        empty,
    )
}


def long_log(path: Path, steps: int, seed: int) -> None:
    """A log of many steps, each as long as a real one; every value can be worked out from its step."""
    draw = random.Random(seed)
    with path.open("w") as file:
        start = {
            "kind": "start",
            "iteration": 0,
            "time": 1.7e9,
            "train_iters": steps,
            "world_size": 8,
            "device": "h100",
        }
        file.write(json.dumps(start) + "\n")
        for iteration in range(1, steps + 1):
            line = {"kind": "step", "iteration": iteration, "time": 1.7e9 + iteration / 2}
            line |= step(iteration, 3, 0.0, **{f"filling/{k}": draw.random() for k in range(14)})
            file.write(json.dumps(line) + "\n")
