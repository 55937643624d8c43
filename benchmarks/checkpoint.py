"""Saving and loading a checkpoint against plain writes and reads of the same bytes.

    python -m benchmarks.checkpoint      # 547 MB; about two minutes on two cores

A plain write is one file in pieces of 16 MiB with fsync at the end; a plain read is `readinto` one buffer. Saves end
when the manifest is on the disk; loads check every hash. Reads of both sides come from the page cache. What a step
costs beside an asynchronous save is measured by `python -m benchmarks.async_save`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.async_save import make_config
from benchmarks.timing import in_turn, machine, parser, write_results

PIECE = 16 * 2**20


def sides(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], Callable[[], int]]:
    """Name -> one save, write, load or read; and the size of a checkpoint in bytes."""
    from megatron_mtp.checkpoint import Checkpointer
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import setup
    from megatron_mtp.training.state import TrainState

    options.interval, options.saves = 1, 1
    cfg = make_config(folder, options)
    cfg.checkpoint.async_save = False
    cfg.checkpoint.load = cfg.checkpoint.save
    run = setup(resolve(cfg.finalize(1), 1))
    torch.set_num_threads(options.threads)
    run.engine.train(next(run.data.train(0)), 0.1)  # the optimizer has its state
    checkpointer, state = Checkpointer(run.cfg, run.groups), TrainState()
    engine, plain = run.engine, folder / "plain"

    def save() -> None:
        state.iteration += 1
        checkpointer.save(engine.chunks, engine.optimizer, state)

    def load() -> None:
        checkpointer.resume(engine.chunks, engine.optimizer, TrainState())

    def size() -> int:
        return sum(file.stat().st_size for file in sorted((folder / "run").glob("iter_*"))[-1].iterdir())

    save()
    content, target = os.urandom(size()), bytearray(size())

    def write() -> None:
        with plain.open("wb", buffering=0) as file:
            for first in range(0, len(content), PIECE):
                file.write(memoryview(content)[first : first + PIECE])
            os.fsync(file.fileno())

    def read() -> None:
        with plain.open("rb", buffering=0) as file:
            file.readinto(target)

    return {"save": save, "plain write": write, "load": load, "plain read": read}, size


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as name:
        runs, size = sides(Path(name), options)
        timings = in_turn(runs, options.rounds)
        megabytes = size() / 1e6
    print(f"{megabytes:.0f} MB")
    for ours, plain in (("save", "plain write"), ("load", "plain read")):
        for side in (ours, plain):
            speed = megabytes / timings[side].median
            print(f"{side:<12} {timings[side]!s:<26} s, {speed:7.0f} MB/s")
        print(f"{ours}: {timings[plain].median / timings[ours].median:.1%} of the speed of a {plain}")
    write_results("checkpoint", options, described, {"megabytes": megabytes, "timings": timings})


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--hidden", type=int, default=640)
    made.add_argument("--folder", help="where to write; default: the folder for temporary files")
    return made.parse_args()


if __name__ == "__main__":
    main()
