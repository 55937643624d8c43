"""What the training loop costs beside the step itself.

    python -m benchmarks.loop      # dense, h 512, 4 layers, v 8192, s 512; about two minutes on two cores

A run trains with its records, watchdog, health signs and evaluation of the stop decision. After each step of the loop a
bare call of the engine trains on the same kind of batch, so both meet the same machine. The loop's time runs from the
end of one bare call to the end of the next step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing, machine, parser, write_results
from megatron_mtp import pretrain
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback

WARM_UP_STEPS = 3


class Alternating(Callback):
    """Times each step of the loop, and a bare call after it."""

    def __init__(self) -> None:
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._last: float | None = None
        self._batch: Any = None

    def on_step_end(self, run: Any, state: Any, result: Any) -> None:
        now = time.perf_counter()
        self._batch = self._batch or next(run.data.train(0))
        if self._last is not None and state.iteration > WARM_UP_STEPS:
            self.loop.append(now - self._last)
        began = time.perf_counter()
        run.engine.train(self._batch, run.resolved.loss_factor.at(0))
        self._last = time.perf_counter()
        if state.iteration > WARM_UP_STEPS:
            self.bare.append(self._last - began)


def main() -> None:
    """Prints both medians and, with --json, writes all times."""
    options = _parse()
    described = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="loop-") as folder:
        clock = Alternating()
        pretrain(_config(Path(folder), options), callbacks=[clock])
    pairs = [loop / bare for loop, bare in zip(clock.loop, clock.bare[-len(clock.loop) :], strict=True)]
    results = {"loop": Timing.of(clock.loop), "bare": Timing.of(clock.bare), "ratio": Timing.of(pairs)}
    print(f"a step of the loop  {results['loop']!s} s")
    print(f"a bare call         {results['bare']!s} s")
    print(f"ratio               {results['ratio']!s} (median of {len(pairs)} neighbours)")
    print(f"mean of the ratios  {statistics.fmean(pairs):.4f}")
    write_results("loop", options, described, results)


def _config(folder: Path, options: argparse.Namespace) -> Any:
    cfg = get_recipe("tiny_dense")
    cfg.model.update(hidden_size=512, ffn_hidden_size=1536, num_layers=4, num_attention_heads=8, num_query_groups=4)
    cfg.model.update(vocab_size=8192, seq_length=512, mtp_num_layers=1)
    cfg.train.update(micro_batch_size=1, global_batch_size=1, train_iters=options.rounds + WARM_UP_STEPS + 1)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = None
    cfg.logger.update(log_dir=str(folder), log_interval=1)
    cfg.dist.update(device="cpu", num_threads=options.threads)
    return cfg


def _parse() -> argparse.Namespace:
    return parser(__doc__, rounds=60).parse_args()


if __name__ == "__main__":
    main()
