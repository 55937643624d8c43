"""Processor time of `megatron-mtp plan`, and the step times that it finds, for several models and numbers of devices.

    python benchmarks/plan_speed.py [--only WORD] [--write FILE.json] [--against FILE.json] [--limit-s 10]

Each case is a process of its own, as a user starts it. Its user and system time counts, which other work on the machine
hardly changes. With `--against`, a file that an earlier version wrote, its numbers are printed next to the new ones.
Exit code 1 if a search takes longer than the limit, or finds a slower step than before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SEARCHES = [
    *(("deepseek_v3", n) for n in (1024, 2048)),
    *(("kimi_k2", n) for n in (512, 2048)),
    *(("qwen3_30b_a3b", n) for n in (16, 64, 256)),
    *(("qwen3_next_80b_a3b", n) for n in (64, 512)),
    *(("glm45", n) for n in (128, 1024)),
    *(("llama3_70b", n) for n in (64, 512)),
    *(("llama3_8b", n) for n in (8, 64, 512)),
    *(("qwen3_32b", n) for n in (8, 64, 512)),
    *(("qwen3_8b", n) for n in (8, 64, 512)),
    *(("tiny_dense", n) for n in (2, 8)),
    ("smollm2_135m", 8),
]
FULL = ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1")
SPLITS = [
    ("deepseek_v3",),
    ("deepseek_v3", "model.virtual_pipeline_model_parallel_size=2", "--memory", "0"),
    ("deepseek_v3", "model.virtual_pipeline_model_parallel_size=3", "--memory", "0"),
    ("deepseek_v3", "model.virtual_pipeline_model_parallel_size=4", "--memory", "0"),
    (
        *("deepseek_v3", "--devices", "1024", *FULL),
        *("model.pipeline_model_parallel_size=8", "model.virtual_pipeline_model_parallel_size=4"),
    ),
    ("deepseek_v3", "train.global_batch_size=512", "train.rampup_batch_size=null", "--memory", "0"),
    (
        *("deepseek_v3", "train.global_batch_size=1024", "train.rampup_batch_size=null", "--memory", "0"),
        "model.virtual_pipeline_model_parallel_size=2",
    ),
    ("kimi_k2", "--memory", "0"),
    ("qwen3_235b_a22b", "--memory", "0"),
    ("deepseek_v3", "model.pipeline_model_parallel_layout=Et*4|(t*4|)*14tmL"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose arguments contain this word")
    parser.add_argument("--write", type=Path, help="write the results to this file")
    parser.add_argument("--against", type=Path, help="results of an earlier version")
    parser.add_argument("--limit-s", type=float, default=10.0, help="maximum processor time of a case")
    options = parser.parse_args()
    earlier = json.loads(options.against.read_text()) if options.against else {}
    cases = [(recipe, "--search", "--devices", str(n)) for recipe, n in SEARCHES] + SPLITS
    found: dict[str, dict[str, Any]] = {}
    is_good = True
    print(f"{'cpu s':>7} {'before':>7} {'step ms':>12} {'before':>12} {'gap':>6} {'before':>6}  case")
    for arguments in cases:
        name = " ".join(arguments)
        if options.only not in name:
            continue
        here = found[name] = measure(arguments)
        before = earlier.get(name, {})
        row = [number(here.get("cpu_s"), "7.2f"), number(before.get("cpu_s"), "7.2f")]
        row += [number(here.get("step_ms"), "12.3f"), number(before.get("step_ms"), "12.3f")]
        row += [number(here.get("gap"), "6.1%"), number(before.get("gap"), "6.1%")]
        print(*row, f" {name}", flush=True)
        is_good &= here["cpu_s"] <= options.limit_s
        if before.get("step_ms"):
            is_good &= (here.get("step_ms") or float("inf")) <= before["step_ms"] * (1 + 1e-6)
        if options.write:
            options.write.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if is_good else 1


def measure(arguments: tuple[str, ...]) -> dict[str, Any]:
    """One case: processor seconds, step time, gap to the bound, layout, and the step times of all rows."""
    command = [sys.executable, "-m", "megatron_mtp", "plan", *arguments, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        return {"cpu_s": cpu_s, "error": done.stderr.strip()}
    data = json.loads(done.stdout)
    return {
        "cpu_s": cpu_s,
        "step_ms": data["plan"]["step_ms"],
        "gap": data["gap"],
        "layout": data["plan"]["layout"],
        "rows_ms": [row["plan"]["step_ms"] for row in data.get("search", [])],
    }


def number(value: float | None, form: str) -> str:
    """A number in its column; a dash where there is none."""
    return "-".rjust(int(form.split(".")[0])) if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
