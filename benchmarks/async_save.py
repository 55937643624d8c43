"""How much training is slowed down by a checkpoint that is written while it goes on.

    python benchmarks/async_save.py

A model with Adam state of at least 500 MB trains on one rank. Steps are timed without a save, and during an
asynchronous one of which every file is on the disk only after some steps: there are as many saves as it takes to see at
least 20. Steps without a save lie between them, so that a machine that gets slower
or faster does so for both. The step in which a checkpoint is made whole and an old one
retired counts as one beside a save; the stall at the start is a figure of its own, `checkpoint/stall_ms`. Exits with 1
where the median step is longer by 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_mtp import pretrain
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback

STEPS_WHILE_SAVING = 20
WARM_UP_STEPS = 4
LIMIT = 1.15


class Clock(Callback):
    """Times steps and tells which of them ran beside a save. Odd saves are asked for by the config."""

    def __init__(self) -> None:
        self.quiet: list[float] = []
        self.beside: list[float] = []
        self.folder: Path | None = None
        self._last: float | None = None
        self._was_saving = False

    def on_train_start(self, run: Any, state: Any) -> None:
        self.folder = Path(run.cfg.checkpoint.save)

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        now, is_saving = time.perf_counter(), any(self.folder.glob("*.partial"))
        if self._last is not None and state.iteration > WARM_UP_STEPS:
            if self._was_saving:
                self.beside.append(now - self._last)
            elif not is_saving:  # else the save began in it, with the stall
                self.quiet.append(now - self._last)
        self._last, self._was_saving = now, is_saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--interval", type=int, default=24)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for the training step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="async-save-") as folder:
        cfg, clock = make_config(Path(folder), options), Clock()
        pretrain(cfg, callbacks=[clock])
        size = sum(file.stat().st_size for file in sorted(Path(folder, "run").glob("iter_*"))[-1].iterdir())
        records = read_metrics(Path(folder, "metrics.jsonl"))
    quiet, beside = clock.quiet, clock.beside
    stalls = [record["checkpoint/stall_ms"] for record in records if "checkpoint/stall_ms" in record]
    ratio = statistics.median(beside) / statistics.median(quiet)
    print(f"checkpoint {size / 1e6:.0f} MB; stall at the start {', '.join(f'{s:.0f}' for s in stalls)} ms")
    print(f"step without a save {statistics.median(quiet) * 1e3:.0f} ms (median of {len(quiet)})")
    print(f"step during a save  {statistics.median(beside) * 1e3:.0f} ms (median of {len(beside)}), x {ratio:.3f}")
    means = statistics.fmean(quiet), statistics.fmean(beside)
    print(f"means: {means[0] * 1e3:.0f} and {means[1] * 1e3:.0f} ms, x {means[1] / means[0]:.3f}")
    sys.exit(not (size >= 500e6 and len(beside) >= STEPS_WHILE_SAVING and ratio < LIMIT))


def make_config(folder: Path, options: argparse.Namespace) -> Any:
    """About 45M weights: 12 bytes of fp32 weights and Adam moments for each, and the weights once more in the
    optimizer's shards.
    """
    cfg = get_recipe("tiny_dense")
    cfg.model.hidden_size, cfg.model.ffn_hidden_size = options.hidden, 4 * options.hidden
    cfg.model.num_layers, cfg.model.mtp_num_layers, cfg.model.seq_length = 4, 1, 16
    cfg.model.vocab_size = 2048
    cfg.train.global_batch_size = cfg.train.micro_batch_size = 1
    cfg.train.train_iters = options.interval * (options.saves + 1) - 1
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save, cfg.checkpoint.save_interval = str(folder / "run"), options.interval
    cfg.checkpoint.async_save, cfg.checkpoint.most_recent_k = True, 1
    cfg.logger.log_dir, cfg.logger.log_interval = str(folder), 1000
    cfg.dist.device, cfg.dist.num_threads = "cpu", options.threads
    return cfg


if __name__ == "__main__":
    main()
