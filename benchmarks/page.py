"""Runs the benchmarks of docs/performance.md and writes its tables.

python -m benchmarks.page                    # the tables, from benchmarks/results
python -m benchmarks.page --run all          # runs everything first, on a quiet machine: about 40 minutes
python -m benchmarks.page --run head loop    # some of it
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
LIMIT_S = 3600

RUNS: dict[str, list[str]] = {
    "step": ["step", "--depths", "0", "1", "2"],
    "mtp_cost": ["mtp_cost"],
    "step_512": ["step", "--seq", "512", "--depths", "1"],
    "step_2048": ["step", "--seq", "2048", "--depths", "1"],
    "step_bf16": ["step", "--dtype", "bf16", "--depths", "1"],
    "step_moe": ["step", "--kind", "moe", "--depths", "1"],
    "head": ["head"],
    "loop": ["loop"],
    "monitoring": ["monitoring"],
    "start": ["start"],
    "prepare": ["prepare", "--rounds", "6"],
    "load": ["load"],
    "checkpoint": ["checkpoint"],
    "async_save": ["async_save"],
}
"""Name of a result -> the benchmark and its options."""


def seconds(timing: dict[str, Any]) -> str:
    """Median and interval."""
    return f"{timing['median']:.3g} [{timing['low']:.3g}, {timing['high']:.3g}]"


def _step(found: dict[str, Any]) -> list[str]:
    lines = [
        "| D | side | s | of ours | share of a product | peak GiB |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for depth in found["results"]["depths"]:
        ours = depth["timings"]["ours"]["median"]
        for side, timing in depth["timings"].items():
            share = depth["gflop"] / timing["median"] / depth["product_gflops"]
            peak = f"{depth['peak_gib'][side]:.2f}"
            ratio = timing["median"] / ours
            lines.append(f"| {depth['depths']} | {side} | {seconds(timing)} | {ratio:.2f} | {share:.0%} | {peak} |")
    return lines


def _mtp_cost(found: dict[str, Any]) -> list[str]:
    """What each number of depths costs beside none, in time and in operations."""
    lines = ["| D | s | share of a product | time | operations |", "| -- | -- | -- | -- | -- |"]
    for depth in found["results"]["depths"]:
        share, work, time = f"{depth['share']:.0%}", f"{depth['operations_ratio']:.3f}", seconds(depth["time_ratio"])
        lines.append(f"| {depth['depths']} | {seconds(depth['timing'])} | {share} | {time} | {work} |")
    return lines


def _head(found: dict[str, Any]) -> list[str]:
    results = found["results"]
    lines = ["| side | s | of ours | share of a product | MiB added |", "| -- | -- | -- | -- | -- |"]
    for side, timing in results["timings"].items():
        ratio = timing["median"] / results["timings"]["ours"]["median"]
        share = results["gflop"] / timing["median"] / results["product_gflops"]
        lines.append(f"| {side} | {seconds(timing)} | {ratio:.2f} | {share:.0%} | {results['added_mib'][side]:.0f} |")
    return lines


def _timings(found: dict[str, Any]) -> list[str]:
    """A table of whatever has a median."""
    results = found["results"]
    timings = results.get("timings") or {name: value for name, value in results.items() if isinstance(value, dict)}
    lines = [
        "| what | s (or ratio) |",
        "| -- | -- |",
        *(f"| {name} | {seconds(found)} |" for name, found in timings.items()),
    ]
    rest = {name: value for name, value in results.items() if isinstance(value, int | float)}
    return lines + [f"| {name} | {value:,.4g} |" for name, value in rest.items()]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {"step": _step, "mtp_cost": _mtp_cost, "head": _head}


def blocks() -> dict[str, str]:
    """Name of each run -> the command and its table, or that there is none yet."""
    found = {}
    for name, command in RUNS.items():
        path, shown = RESULTS / f"{name}.json", f"`python -m benchmarks {' '.join(command)}`"
        if not path.exists():
            found[name] = f"{shown}: not measured yet for this version."
            continue
        content = json.loads(path.read_text())
        table = TABLES.get(command[0], _timings)(content)
        machine = content["machine"]
        load = machine["load_before"]
        processor = " ".join([machine["processor"], *machine.get("vector", "").split()[-1:]])
        where = f"{processor}, {machine['threads']} threads, torch {machine['torch']}, load before {load:.1f}"
        found[name] = "\n".join([f"{shown} ({where}).", "", *table])
    return found


def filled(page: str) -> str:
    """The page with its tables: what stands between `<!-- NAME -->` and `<!-- end -->` is replaced."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->"

    tables = blocks()
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def run(name: str) -> None:
    """One benchmark in a process of its own; its results go to benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    print(f"== {name}: {' '.join(RUNS[name])}", flush=True)
    command = [sys.executable, "-m", "benchmarks", *RUNS[name], "--json", str(target)]
    subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=True)


def main() -> None:
    """Runs what was asked for and writes the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", nargs="+", choices=[*RUNS, "all"], default=[])
    names = made.parse_args().run
    for name in RUNS if "all" in names else names:
        run(name)
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
