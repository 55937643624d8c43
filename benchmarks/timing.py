"""What every timing here has in common: sides in turn on a pinned number of threads, medians, and the machine."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # a benchmark's worker processes import this file, and torch takes seconds
    import torch

WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one side, in seconds.

    Attributes:
        low, high: the sign test's interval of the median, which holds it in 95 of 100 repetitions or more.
    """

    median: float
    low: float
    high: float
    times: list[float]

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """The median of at least six times and its interval."""
        ordered, count = sorted(times), len(times)
        outside, below = 0.0, 0
        while below < count // 2:
            outside += math.comb(count, below) / 2**count
            if outside > 0.025:
                break
            below += 1
        first = max(0, below - 1)
        return cls(statistics.median(ordered), ordered[first], ordered[count - 1 - first], times)

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Runs every side once in each round, in an order that alternates, so that all meet the same machine."""
    for _ in range(WARM_UPS):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            began = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - began)
    return {name: Timing.of(found) for name, found in times.items()}


def machine(threads: int) -> dict[str, object]:
    """What a reader of a timing needs to know of the machine."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": threads,
        "load_before": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "vector": _vector(),
    }


def in_turn_with_product(
    sides: Mapping[str, Callable[[], object]], rounds: int, size: tuple[torch.dtype, int, int, int]
) -> tuple[dict[str, Timing], float]:
    """`in_turn`, and the speed in GFLOP/s of a matrix product that takes its turn: what the machine could do then.

    Args:
        size: dtype, tokens, inner and outer width of [tokens, inner] x [inner, outer]. Its memory is kept.
    """
    import torch

    dtype, tokens, inner, outer = size
    left, right = torch.randn(tokens, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
    out = torch.empty(tokens, outer, dtype=dtype)
    timings = in_turn({**sides, "": lambda: torch.mm(left, right.t(), out=out)}, rounds)
    return timings, 2e-9 * tokens * inner * outer / timings.pop("").median


def parser(doc: str | None, *, threads: int = 2, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=threads)
    made.add_argument("--rounds", type=int, default=rounds, help="of each side; the median is of these")
    made.add_argument("--json", help="file for all results")
    return made


def write_results(name: str, options: argparse.Namespace, described: dict[str, object], results: Any) -> None:
    """Writes the results to the file of --json, if it was given."""
    if options.json is None:
        return
    given = {field: value for field, value in vars(options).items() if field != "json"}
    content = {"benchmark": name, "machine": described, "options": given, "results": results}
    Path(options.json).write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def _plain(value: object) -> object:
    return value.as_dict() if isinstance(value, Timing) else str(value)


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor()


def _vector() -> str:
    """The vector instructions that decide the speed of products."""
    flags = _cpuinfo("flags").split()
    return " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags)


def _cpuinfo(field: str) -> str:
    """A field of the first processor on Linux; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""
