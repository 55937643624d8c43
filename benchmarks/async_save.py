"""How much an asynchronous save slows down the steps that run meanwhile.

    python -m benchmarks.async_save

A model with Adam state of at least 500 MB trains on one rank. Steps during a save and steps without one alternate, so
that a machine that gets slower or faster affects both. The step in which a checkpoint is completed and an old one
deleted counts as one during a save. The stall at the start of a save, when the weights are copied, belongs to neither:
it is printed apart (`checkpoint/stall_ms`). Exit code 1, with the reason, if the median step takes 15 % longer, if
fewer than 20 steps ran during a save, or if the checkpoint is too small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import timing
from megatron_mtp import pretrain
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback

STEPS_WHILE_SAVING = 20
"""Steps during a save that a median needs."""
STEPS_OF_A_SAVE = 3
"""How many ran during one save of the default size where this was first measured; more on a slower disk."""
MIN_BYTES = 500e6
WARM_UP_STEPS = 4
LIMIT = 1.15


class Clock(Callback):
    """Times the steps, those during a save apart from the others."""

    def __init__(self) -> None:
        self.quiet: list[float] = []
        self.during: list[float] = []
        self._last: float | None = None
        self._was_saving = False

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        now, is_saving = time.perf_counter(), any(Path(run.cfg.checkpoint.save).glob("*.partial"))
        if self._last is not None and state.iteration > WARM_UP_STEPS:
            if self._was_saving:
                self.during.append(now - self._last)
            elif not is_saving:  # else the save began in it, with the stall
                self.quiet.append(now - self._last)
        self._last, self._was_saving = now, is_saving


def parser() -> argparse.ArgumentParser:
    """The options; by default there are enough saves for STEPS_WHILE_SAVING steps, and a few to spare."""
    parser = timing.parser(__doc__, threads=1)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--interval", type=int, default=18)
    parser.add_argument("--saves", type=int, default=8)
    return parser


def failures(num_bytes: float, num_during: int, ratio: float) -> list[str]:
    """Why a measurement does not show what it should."""
    found = []
    if num_bytes < MIN_BYTES:
        found.append(f"the checkpoint has {num_bytes / 1e6:.0f} of {MIN_BYTES / 1e6:.0f} MB: raise --hidden")
    if num_during < STEPS_WHILE_SAVING:
        found.append(f"{num_during} of {STEPS_WHILE_SAVING} steps ran during a save: raise --saves")
    if ratio >= LIMIT:
        found.append(f"a step during a save takes {ratio:.3f} times as long as one without, the limit is {LIMIT}")
    return found


def main() -> None:
    options = parser().parse_args()
    described = timing.machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="async-save-") as folder:
        cfg, clock = make_config(Path(folder), options), Clock()
        pretrain(cfg, callbacks=[clock])
        size = sum(file.stat().st_size for file in sorted(Path(folder, "run").glob("iter_*"))[-1].iterdir())
        records = read_metrics(Path(folder, "metrics.jsonl"))
    quiet, during = clock.quiet, clock.during
    stalls = [record["checkpoint/stall_ms"] for record in records if "checkpoint/stall_ms" in record]
    ratio = statistics.median(during) / statistics.median(quiet)
    print(f"checkpoint {size / 1e6:.0f} MB; stall at the start {', '.join(f'{s:.0f}' for s in stalls)} ms")
    print(f"step without a save {statistics.median(quiet) * 1e3:.0f} ms (median of {len(quiet)})")
    print(f"step during a save  {statistics.median(during) * 1e3:.0f} ms (median of {len(during)}), x {ratio:.3f}")
    means = statistics.fmean(quiet), statistics.fmean(during)
    print(f"means: {means[0] * 1e3:.0f} and {means[1] * 1e3:.0f} ms, x {means[1] / means[0]:.3f}")
    results = {"megabytes": size / 1e6, "stall_ms": statistics.median(stalls), "ratio": ratio}
    timings = {"step without a save": timing.Timing.of(quiet), "step during a save": timing.Timing.of(during)}
    timing.write_results("async_save", options, described, results | {"timings": timings})
    if found := failures(size, len(during), ratio):
        sys.exit("\n".join(found))


def make_config(folder: Path, options: argparse.Namespace) -> Any:
    """About 45M weights, each with 12 bytes of fp32 weight and Adam moments, and 4 in the optimizer's shards."""
    cfg = get_recipe("tiny_dense")
    cfg.model.update(hidden_size=options.hidden, ffn_hidden_size=4 * options.hidden, num_layers=4, mtp_num_layers=1)
    cfg.model.update(seq_length=16, vocab_size=2048)
    train_iters = options.interval * (options.saves + 1) - 1
    cfg.train.update(global_batch_size=1, micro_batch_size=1, train_iters=train_iters)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.update(save=str(folder / "run"), save_interval=options.interval, async_save=True, most_recent_k=1)
    cfg.logger.update(log_dir=str(folder), log_interval=1000)
    cfg.dist.update(device="cpu", num_threads=options.threads)
    return cfg


if __name__ == "__main__":
    main()
