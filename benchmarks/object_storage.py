"""Reading training data from object storage: samples a second with a cold and a warm cache, and bytes for a byte used.

    python -m benchmarks object_storage      # about three minutes; starts moto's S3 server on this machine

Three ways are compared in turn: local files, an empty cache, and a cache that holds all of the data, each read in the
order of training by one process without prefetching. moto's server is written in Python and shares this machine, so it
limits the cold cache; with --address the data goes to a real server (its bucket must exist). The second part counts
what a cache that is smaller than the data downloads, by size of the blocks, without a server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import config, open_data, write_data
from benchmarks.timing import Timing, machine, parser, write_results
from megatron_mtp.data.object_file import TOKEN_BLOCK
from megatron_mtp.storage.remote_path import RemotePath

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
SHARES = (0.1, 0.5, 0.9)
BLOCKS = (64 << 10, TOKEN_BLOCK, 1 << 20, 8 << 20)


@contextmanager
def moto_server() -> Iterator[str]:
    """Address of a bucket of a server that ends with the block."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    os.environ.update(CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    try:
        for _ in range(600):
            time.sleep(0.1)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        boto3.client("s3").create_bucket(Bucket="bench")
        yield "s3://bench/data"
    finally:
        process.kill()
        process.wait()


def seconds_to_read(prefix: str, cache: Path, steps: int, *, prefetch: int) -> float:
    """Seconds to open the data and read `steps` global batches."""
    cfg = config([prefix], cache / "order", object_storage_cache_path=str(cache), prefetch_steps=prefetch)
    began = time.perf_counter()
    data = open_data(cfg)
    stream = data.train(0)
    for _ in range(steps):
        next(stream)
    spent_s = time.perf_counter() - began
    data.close()
    return spent_s


def downloads(block_bytes: int, share: float, documents: int, mean_bytes: int) -> tuple[float, float]:
    """Bytes downloaded for a byte used, and requests for a document, with a cache of a share of the data.

    Documents have log-normal lengths and are read in a random order; the second epoch is counted.
    """
    random = np.random.default_rng(0)
    sizes = np.maximum(2, random.lognormal(0, 1, documents) * mean_bytes / np.exp(0.5)).astype(np.int64)
    begins = np.cumsum(sizes) - sizes
    most, held = int(share * sizes.sum()) // block_bytes, OrderedDict[int, None]()
    requests = 0
    for epoch in range(2):
        requests = 0
        order = random.permutation(documents)
        first, last = begins[order] // block_bytes, (begins[order] + sizes[order] - 1) // block_bytes
        for low, high in zip(first.tolist(), last.tolist(), strict=True):
            for block in range(low, high + 1):
                if block in held:
                    held.move_to_end(block)
                    continue
                requests += 1
                held[block] = None
                if len(held) > most:
                    held.popitem(last=False)
        assert epoch or requests
    return requests * block_bytes / int(sizes.sum()), requests / documents


def measure(options: argparse.Namespace, address: str) -> dict[str, Any]:
    """Times of each way."""
    times: dict[str, list[float]] = {"files": [], "cold": [], "warm": [], "cold, prefetched": []}
    with tempfile.TemporaryDirectory(prefix="object-storage-") as name:
        folder = Path(name)
        [prefix] = write_data(folder, 1, options.documents, options.length)
        for ending in (".bin", ".idx"):
            (RemotePath(address) / f"set_0{ending}").write_bytes(Path(f"{prefix}{ending}").read_bytes())
        there, cache = f"{address}/set_0", folder / "cache"
        steps = options.samples // config([prefix], None).train.global_batch_size
        for _ in range(options.rounds):
            times["files"].append(seconds_to_read(prefix, folder, steps, prefetch=0))
            for way, prefetch in (("cold", 0), ("cold, prefetched", 2)):
                shutil.rmtree(cache, ignore_errors=True)
                times[way].append(seconds_to_read(there, cache, steps, prefetch=prefetch))
            times["warm"].append(seconds_to_read(there, cache, steps, prefetch=0))
        mb = Path(f"{prefix}.bin").stat().st_size / 1e6
    print(f"{options.samples:,} samples of a data set of {mb:.0f} MB, opened and read by one process:")
    for way, found in times.items():
        timing = Timing.of(found)
        print(f"{way:>18}: {timing!s} s, {options.samples / timing.median:,.0f} samples/s")
    return {way: Timing.of(found) for way, found in times.items()}


def main() -> None:
    """Prints the rates and the downloads and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    if options.address is not None:
        results = measure(options, options.address)
    else:
        with moto_server() as address:
            results = measure(options, address)
    print(f"\nbytes downloaded for a byte used, and requests for a document of {options.mean_bytes} bytes on average:")
    print("block         " + "  ".join(f"cache of {share:.0%} of the data" for share in SHARES))
    for block_bytes in BLOCKS:
        counts = [downloads(block_bytes, share, 500_000, options.mean_bytes) for share in SHARES]
        results[f"downloads {block_bytes}"] = counts
        text = "".join(f"{ratio:>12.1f}, {each:.2f}{'':8}" for ratio, each in counts)
        print(f"{block_bytes >> 10:>6} KiB    {text}")
    write_results("object_storage", options, described, results)


def _parse() -> argparse.Namespace:
    made = parser(__doc__, rounds=7)
    made.add_argument("--address", help="folder of a bucket that exists; default: moto's server on this machine")
    made.add_argument("--documents", type=int, default=50_000)
    made.add_argument("--length", type=int, default=400, help="mean tokens of a document")
    made.add_argument("--samples", type=int, default=4_000)
    made.add_argument("--mean-bytes", type=int, default=2_000, help="of a document, where downloads are counted")
    return made.parse_args()


if __name__ == "__main__":
    main()
