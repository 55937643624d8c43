"""Planned against measured step time on this machine: pipeline stages on the CPU, with and without MTP and experts.

    python -m benchmarks.plan_accuracy [--rounds 11] [--apart] [--kind moe] [--stages 4] [--write FILE.json]

Every round times a step of each split, one after the other (A B C ... A B C ...), and one step of the profile, so that
load on the machine affects all of them alike. With --apart the profile is complete before the first step is timed, as
users take it, and its own verdict on the machine is printed. Each process has one thread and needs a core: four stages
are refused on two cores, where they would measure how the system shares them. A split of twice as many numbers as
stages is interleaved. Prints the plan of each
split, and the measured median with its 95 % confidence interval. Exit code 1 if a plan is off by more than 10 %, or if
two splits whose intervals do not overlap are planned in the wrong order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import median
from unittest import mock

import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.device.host_memory import keep_freed_memory
from megatron_mtp.device.process_group import job_size
from megatron_mtp.device.worker_pool import WorkerPool
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.part_costs import PartCosts
from megatron_mtp.parallel.planner.planner import Planner
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.profile.job import CpuProfiler
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training import setup as setup_module
from megatron_mtp.verify.run import PRELOAD

TOLERANCE = 0.10
SIZE = (
    "model.num_layers=8 model.hidden_size=256 model.seq_length=128 model.vocab_size=2048 "
    "train.micro_batch_size=1 train.global_batch_size=4 dist.device=cpu dist.num_threads=1 validation.eval_iters=0"
)
KINDS = {
    "dense": ("tiny_dense", "model.ffn_hidden_size=768"),
    "moe": ("tiny_mixtral", "model.ffn_hidden_size=768 model.moe_ffn_hidden_size=256 model.num_moe_experts=8"),
}
"""Recipe and sizes."""
SPLITS: dict[tuple[str, int], list[tuple[int, tuple[int, ...]]]] = {
    ("dense", 2): [
        *((0, split) for split in ((4, 4), (5, 3), (3, 5), (6, 2), (2, 2, 2, 2), (3, 2, 2, 1))),
        *((2, split) for split in ((4, 4), (5, 3), (6, 2), (7, 1), (2, 2, 2, 2), (3, 2, 2, 1))),
    ],
    ("moe", 2): [
        *((0, split) for split in ((4, 4), (5, 3), (3, 5), (2, 2, 2, 2))),
        *((2, split) for split in ((4, 4), (6, 2), (2, 2, 2, 2), (3, 2, 2, 1))),
    ],
    ("dense", 4): [(d, split) for d in (0, 2) for split in ((2, 2, 2, 2), (3, 2, 2, 1), (1,) * 8)],
    ("moe", 4): [(d, split) for d in (0, 2) for split in ((2, 2, 2, 2), (3, 2, 2, 1), (1,) * 8)],
}
"""Kind and stages -> MTP depths and decoder layers of each chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One split: milliseconds of a step."""

    depths: int
    split: tuple[int, ...]
    planned: float
    measured: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Planned over measured, less one."""
        return self.planned / self.measured - 1


def main() -> int:
    """Runs everything and returns the exit code."""
    arguments = _arguments()
    kind, stages = arguments.kind, arguments.stages
    splits = SPLITS[kind, stages]
    configs = [config(kind, stages, depths, split) for depths, split in splits]
    deepest = next(cfg for cfg, (depths, split) in zip(configs, splits, strict=True) if depths and len(split) == stages)
    times: list[list[float]] = [[] for _ in splits]
    began = time.monotonic()
    with ExitStack() as stack:
        profiler = stack.enter_context(CpuProfiler(deepest, processes=stages))
        if arguments.apart:
            profiler.advance(arguments.rounds)
            profile = profiler.profile()
            stack.close()
            print(f"the profile says: {profile.notes['noise_in_words']}")
        pools = []
        for interleaved in (False, True):  # Megatron-Core keeps the number of virtual stages for the whole process
            pool = stack.enter_context(WorkerPool(stages, timeout_s=600, preload=PRELOAD))
            chosen = [i for i, (_, split) in enumerate(splits) if (len(split) > stages) == interleaved]
            pool.hold(SplitRuns, [configs[i] for i in chosen])
            pool.run_held(SplitRuns.time_round)
            pools.append((pool, chosen))
        for _ in range(arguments.rounds):
            if not arguments.apart:
                profiler.advance(1)
            for pool, chosen in pools:
                for i, ranks in zip(chosen, zip(*pool.run_held(SplitRuns.time_round), strict=True), strict=True):
                    times[i].append(max(ranks))
        if not arguments.apart:
            profile = profiler.profile()
    outcomes = [
        outcome(cfg, depths, split, profile.costs, found)
        for cfg, (depths, split), found in zip(configs, splits, times, strict=True)
    ]
    print(f"{arguments.rounds} rounds in {time.monotonic() - began:.0f} s")
    is_right = report(outcomes)
    if arguments.write:
        record = {"profile": asdict(profile), "times_ms": times, "outcomes": [asdict(one) for one in outcomes]}
        arguments.write.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return int(not is_right)


def config(kind: str, stages: int, depths: int, split: tuple[int, ...]) -> ConfigContainer:
    """The finalized config of a split."""
    recipe, sizes = KINDS[kind]
    cfg = get_recipe(recipe)
    fields = {
        "model.pipeline_model_parallel_size": stages,
        "model.pipeline_model_parallel_layout": f"[{','.join(map(str, split))}]",
        "model.mtp_num_layers": depths,
    }
    if len(split) > stages:
        fields["model.virtual_pipeline_model_parallel_size"] = len(split) // stages
    apply_overrides(cfg, [*SIZE.split(), *sizes.split(), *(f"{name}={value}" for name, value in fields.items())])
    return cfg.finalize(stages)


def outcome(cfg: ConfigContainer, depths: int, split: tuple[int, ...], costs: PartCosts, times: list[float]) -> Outcome:
    """Median, its interval, and the plan."""
    low, high = interval_of_median(times)
    step = Planner(RunShape.of(cfg, cfg.model.pipeline_model_parallel_size), costs, is_cpu=True).step(
        PipelineLayout.of(cfg.model)
    )
    return Outcome(depths=depths, split=split, planned=step.total_ms, measured=median(times), low=low, high=high)


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """A 95 % confidence interval from order statistics, for any distribution."""
    ordered, count = sorted(values), len(values)
    tail, outside = 0, 0.0
    while outside + 2 * comb(count, tail) / 2**count <= 0.05:
        outside += 2 * comb(count, tail) / 2**count
        tail += 1
    return ordered[max(0, tail - 1)], ordered[min(count - 1, count - tail)]


def report(outcomes: list[Outcome]) -> bool:
    """Prints the table and what is wrong. Returns whether everything is right."""
    print(f"{'depths':>6} {'split':>10} {'planned':>8} {'measured':>9} {'95 % interval':>17} {'error':>7}  ms")
    for one in outcomes:
        split = ",".join(map(str, one.split))
        print(
            f"{one.depths:>6} {split:>10} {one.planned:>8.0f} {one.measured:>9.0f} "
            f"{one.low:>8.0f} {one.high:>8.0f} {one.error:>+7.1%}"
        )
    pairs = [pair for pair in combinations(outcomes, 2) if pair[0].high < pair[1].low or pair[1].high < pair[0].low]
    wrong = [(a, b) for a, b in pairs if (a.measured < b.measured) != (a.planned < b.planned)]
    worst = max(abs(one.error) for one in outcomes)
    print(
        f"largest error {worst:.1%}; of {len(pairs)} pairs with separate intervals {len(wrong)} are in the wrong order"
    )
    for a, b in wrong:
        print(f"  wrong order: depths {a.depths} {a.split} and depths {b.depths} {b.split}")
    return worst <= TOLERANCE and not wrong


class SplitRuns:
    """On a worker: one run for each split, all over the same process groups."""

    def __init__(self, configs: list[ConfigContainer]):
        resolved = [resolve(cfg, job_size()) for cfg in configs]
        joined = setup_module.join_groups(resolved[-1])  # groups of the deepest model serve the others too
        with mock.patch.object(setup_module, "join_groups", return_value=joined):
            self.runs = [setup_module.setup(one) for one in resolved]
        keep_freed_memory()  # as `pretrain` does
        self.batches = [next(run.data.train()) for run in self.runs]
        for run in self.runs:
            run.data.close()

    def time_round(self) -> list[float]:
        """One step of each split, in milliseconds."""
        found = []
        for run, batch in zip(self.runs, self.batches, strict=True):
            destroy_moe_metrics_tracker()  # it has the number of layers of the run before
            dist.barrier()
            start = time.perf_counter()
            run.engine.train(batch, 0.1)
            found.append((time.perf_counter() - start) * 1e3)
        return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each split")
    parser.add_argument("--kind", choices=KINDS, default="dense")
    parser.add_argument("--stages", type=int, choices=(2, 4), default=2)
    parser.add_argument("--apart", action="store_true", help="measure the profile before the steps")
    parser.add_argument("--write", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if cores < arguments.stages:
        parser.error(f"--stages {arguments.stages}: this process may use {cores} cores, and each stage needs one")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
