"""Reading training data: batches a second from one process, and how long a blend of many data sets takes to open.

    python -m benchmarks.load      # about two minutes on two cores

Samples are read as training reads them, without prefetching, at a tiny recipe's size, and compared with what the
fastest tiny step uses up. The blend is opened without an index cache ("cold"), then with the cache that the first
opening made, each to its first batch, each in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Timing, in_turn, machine, parser, write_results
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.recipes import get_recipe

READ_STEPS = 50


def write_data(folder: Path, count: int, documents: int, length: int) -> list[str]:
    """Prefixes of `count` data sets of random documents, `length` tokens each on average."""
    random, prefixes = np.random.default_rng(0), []
    for index in range(count):
        lengths = random.integers(length // 2, 3 * length // 2, documents)
        writer = IndexedWriter(str(folder / f"set_{index}"), np.dtype(np.uint16))
        writer.write(random.integers(1, 250, int(lengths.sum())).astype(np.uint16), lengths.astype(np.int32))
        writer.close()
        prefixes.append(str(folder / f"set_{index}"))
    return prefixes


def config(prefixes: list[str], cache: Path | None, **dataset: Any) -> ConfigContainer:
    """The smallest recipe on these data sets, with other fields of the section dataset."""
    cfg = get_recipe("tiny_dense")
    cfg.dataset.mock = False
    cfg.dataset.blend = prefixes
    cfg.dataset.prefetch_steps = 0
    cfg.dataset.path_to_cache = str(cache) if cache else None
    cfg.dataset.update(**dataset)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = None
    cfg.dist.device = "cpu"
    return cfg.finalize(1)


def open_data(cfg: ConfigContainer) -> Any:
    """The data of a run of one rank."""
    return build_data(cfg, DataPlacement(0, 1, 0, 1), num_depths=cfg.model.mtp_num_layers or 0)


def seconds_to_first_batch(prefixes: list[str], cache: Path | None) -> float:
    """In a new process, without its imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_first_batch, (prefixes, cache))


def _first_batch(prefixes: list[str], cache: Path | None) -> float:
    cfg = config(prefixes, cache)
    began = time.perf_counter()
    next(open_data(cfg).train(0))
    return time.perf_counter() - began


def samples_used_a_second(cfg: ConfigContainer, rounds: int, threads: int) -> float:
    """Samples a second that training needs, by its fastest step."""
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import setup

    run = setup(resolve(cfg, 1))
    torch.set_num_threads(threads)
    batch = next(run.data.train(0))
    timing = in_turn({"step": lambda: run.engine.train(batch, 0.1)}, rounds)["step"]
    run.close()
    return cfg.train.global_batch_size / min(timing.times)


def main() -> None:
    """Prints the rates and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        folder = Path(name)
        prefixes = write_data(folder, options.sets, options.documents, options.length)
        cfg = config(prefixes[:1], None)
        stream = open_data(cfg).train(0)
        steps = in_turn({"batches": lambda: [next(stream) for _ in range(READ_STEPS)]}, options.rounds)["batches"]
        read = READ_STEPS * cfg.train.global_batch_size / steps.median
        used = samples_used_a_second(cfg, options.rounds, options.threads)
        cold, cached = [], []
        for _ in range(options.rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cold.append(seconds_to_first_batch(prefixes, folder / "cache"))
            cached.append(seconds_to_first_batch(prefixes, folder / "cache"))
    results = {"read_per_s": read, "used_per_s": used, "cold": Timing.of(cold), "cached": Timing.of(cached)}
    print(f"one process reads {read:,.0f} samples/s of {cfg.model.seq_length} tokens")
    print(f"the fastest tiny step uses {used:,.0f} samples/s: {read / used:.0f} times are read")
    print(f"a blend of {options.sets} data sets, to the first batch: cold {results['cold']!s} s")
    print(f"{'with its cache':>53}: {results['cached']!s} s")
    write_results("load", options, described, results)


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--sets", type=int, default=100)
    made.add_argument("--documents", type=int, default=20_000, help="of each data set")
    made.add_argument("--length", type=int, default=400, help="mean tokens of a document")
    return made.parse_args()


if __name__ == "__main__":
    main()
