"""What MTP costs: the step at D depths beside the step without, all in turn, and the ratio of their operations.

    python -m benchmarks.mtp_cost      # dense, s = 1024, D = 0, 1, 2, 4; about four minutes on two cores

The models stand beside each other in one process, so that a machine whose speed changes changes it for all of them. One
matrix product of the head's size takes its turn too: it is what this machine can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.step import DTYPES, KINDS, config, head_size
from benchmarks.timing import Timing, in_turn_with_product, machine, parser, write_results


def steps(options: argparse.Namespace) -> tuple[dict[int, Callable[[], object]], dict[int, float]]:
    """Number of depths -> one step of that model, and its GFLOP."""
    from megatron_mtp.device.host_memory import keep_freed_memory
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.gpt_step import forward_step
    from megatron_mtp.training.setup import build, join_groups
    from megatron_mtp.training.throughput import Throughput

    configs = {d: config(options.kind, options.seq, d, options.dtype, options.layers) for d in options.depths}
    resolved = {depths: resolve(cfg, 1) for depths, cfg in configs.items()}
    device, groups = join_groups(next(iter(resolved.values())))
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a run does

    def make(depths: int) -> Callable[[], object]:
        run = build(resolved[depths], device, groups, forward_step)
        batch, factor = next(run.data.train(0)), run.resolved.loss_factor.at(0)
        return lambda: run.engine.train(batch, factor)

    operations = {depths: Throughput.of(cfg, 1, "cpu").flops(1) / 1e9 for depths, cfg in configs.items()}
    return {depths: make(depths) for depths in options.depths}, operations


def ratio(timing: Timing, base: Timing) -> Timing:
    """Time beside the base's in the same round."""
    return Timing.of([one / other for one, other in zip(timing.times, base.times, strict=True)])


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    runs, operations = steps(options)
    sides = {f"D={depths}": run for depths, run in runs.items()}
    timings, speed = in_turn_with_product(sides, options.rounds, head_size(options))
    base, results = timings[f"D={options.depths[0]}"], []
    print(f"{options.kind}, {options.dtype}, s {options.seq}; a product runs at {speed:.0f} GFLOP/s")
    for depths in options.depths:
        timing = timings[f"D={depths}"]
        found: dict[str, Any] = {
            "depths": depths,
            "timing": timing,
            "share": operations[depths] / timing.median / speed,
            "time_ratio": ratio(timing, base),
            "operations_ratio": operations[depths] / operations[options.depths[0]],
        }
        results.append(found)
        print(
            f"D={depths}  {timing!s:<24} s, {found['share']:5.1%} of a product; "
            f"time {found['time_ratio']}, operations {found['operations_ratio']:.3f}"
        )
    write_results("mtp_cost", options, described, {"product_gflops": speed, "depths": results})


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--kind", choices=KINDS, default="dense")
    made.add_argument("--seq", type=int, default=1024)
    made.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 4], help="the first is the base")
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--layers", type=int, default=8)
    return made.parse_args()


if __name__ == "__main__":
    main()
