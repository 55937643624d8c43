"""What monitoring costs: steps with measurements and health signs, and steps without, in turn.

    python -m benchmarks monitoring      # dense, h 512, 4 layers, v 8192, s 256, D 2; about three minutes on two cores

Both sides train on the same batch and write the same records. One side also measures at the default interval and
watches for signs. A round is one interval of steps of each side, so each has one measured step in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing, in_turn, machine, parser, write_results
from megatron_mtp.observe.health import HealthMonitor, SignEvent
from megatron_mtp.recipes import get_recipe


def main() -> None:
    """Prints the time of a step of both sides and their ratio."""
    options = _parse()
    described = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="monitoring-") as folder:
        sides, steps = _sides(Path(folder), options)
        timings = in_turn(sides, options.rounds)
    on, off = timings["monitored"], timings["not monitored"]
    cost = Timing.of([100 * (a / b - 1) for a, b in zip(on.times, off.times, strict=True)])
    on, off = (Timing.of([t / steps for t in side.times]) for side in (on, off))
    results = {"monitored": on, "not monitored": off, "cost in percent": cost, "steps of a round": steps}
    print(f"a monitored step    {on!s} s")
    print(f"without monitoring  {off!s} s")
    print(f"cost in percent     {cost!s} (median of {options.rounds} rounds of {steps} steps of each side)")
    write_results("monitoring", options, described, results)


class _Silent(HealthMonitor):
    """In the place of the health monitor."""

    def check(self, iteration: int, metrics: Mapping[str, float]) -> list[SignEvent]:
        return []


def _sides(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from megatron_mtp.observe.recorder import Recorder, RunInfo
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.measurements import Measurements
    from megatron_mtp.training.setup import setup
    from megatron_mtp.training.state import TrainState
    from megatron_mtp.training.step_record import step_record
    from megatron_mtp.training.throughput import Throughput

    cfg = _config(folder, options).finalize(1)
    run, state = setup(resolve(cfg, 1)), TrainState()
    steps, batch = cfg.logger.health_interval, next(run.data.train(0))
    measurements = Measurements(run.resolved, run.engine.chunks, run.groups, run.device.torch_device)
    throughput = Throughput.of(cfg, 1, "cpu")
    recorders = {}
    for name in ("monitored", "not monitored"):
        cfg_of_side = cfg.copy()
        cfg_of_side.logger.log_dir = str(folder / name)
        recorders[name] = Recorder(cfg_of_side, RunInfo(), is_writer=True)
    recorders["not monitored"]._health = _Silent()

    def one_step(name: str) -> None:
        is_on, began = name == "monitored", time.perf_counter()
        if is_on:
            measurements.begin(state.iteration + 1)
        result = run.engine.train(batch, 0.1)
        elapsed_s = time.perf_counter() - began
        state.advance(len(batch.sample_ids), cfg.model.seq_length)
        record = step_record(
            run,
            state,
            result,
            batch_size=len(batch.sample_ids),
            learning_rate=0.0,
            loss_factor=0.1,
            elapsed_s=elapsed_s,
            rates=throughput.rates(len(batch.sample_ids), elapsed_s),
            extra={**(measurements.read(1.0) if is_on else {}), "perf/data_ms": 0.1},
        )
        recorders[name].step(record)

    def side(name: str) -> Any:
        def run_steps() -> None:
            for _ in range(steps):
                one_step(name)

        return run_steps

    return {name: side(name) for name in recorders}, steps


def _config(folder: Path, options: argparse.Namespace) -> Any:
    cfg = get_recipe("tiny_dense")
    cfg.model.update(hidden_size=512, ffn_hidden_size=1536, num_layers=4, num_attention_heads=8, num_query_groups=4)
    cfg.model.update(vocab_size=8192, seq_length=256, mtp_num_layers=2)
    if options.small:
        cfg.model.update(hidden_size=64, ffn_hidden_size=192, vocab_size=512, seq_length=64)
    cfg.train.update(micro_batch_size=1, global_batch_size=1, train_iters=100_000)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = None
    cfg.logger.update(log_dir=str(folder), log_interval=1000, progress_bar=False)
    cfg.dist.update(device="cpu", num_threads=options.threads)
    return cfg


def _parse() -> argparse.Namespace:
    made = parser(__doc__, rounds=20)
    made.add_argument("--small", action="store_true", help="a model of milliseconds, to try the command")
    return made.parse_args()


if __name__ == "__main__":
    main()
