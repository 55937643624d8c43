"""Checks the machines of a job before the first step, for mistakes that would otherwise show hours later or as a hang.

Versions must be equal on all ranks, and all ranks must share the checkpoint folder. Bandwidth and clocks are measured
and logged: a slow link is no mistake of the user, but often the reason for a slow run, and logs of machines with
different clocks cannot be read side by side. What a machine can check alone, `doctor/node.py` does.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.env import package_versions
from megatron_mtp.storage.place import Place, files_in, place, write_durably

logger = logging.getLogger(__name__)

PROBE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
SLOW_SHARE = 0.5
"""A link below this share of the median of its kind is named."""
CLOCK_S = 1.0
"""A clock that differs by more from the median is named; synchronized ones differ by milliseconds."""
VISIBLE_S = 10.0
"""A file written on one machine must be seen on the others within this time; NFS caches folders for seconds."""


@dataclass(frozen=True, slots=True)
class Node:
    """Host and versions of one rank."""

    host: str
    versions: dict[str, str]


def check_nodes(cfg: ConfigContainer, device: torch.device) -> None:
    """A collective; does nothing in a job of one process.

    Raises:
        ConfigError: on every rank: versions differ, or checkpoint.save is not one folder for all.
    """
    if dist.get_world_size() == 1 or not cfg.dist.node_check:
        return
    nodes = _gathered(Node(socket.gethostname(), _versions(device)))
    problems = version_problems(nodes)
    if cfg.checkpoint.save:
        problems += _sharing_problems(place(cfg.checkpoint.save), nodes)
    if problems:
        raise ConfigError(problems)
    hosts = [node.host for node in nodes]
    dist.barrier()
    times = _gathered(time.time())
    for line in [*clock_report(times, hosts), *bandwidth_report(_gathered(_bandwidth_to_next(device)), hosts)]:
        logger.info("%s", line)


def version_problems(nodes: list[Node]) -> list[str]:
    """One sentence for each package whose versions differ."""
    problems = []
    for package in sorted({name for node in nodes for name in node.versions}):
        found: dict[str, list[int]] = defaultdict(list)
        for rank, node in enumerate(nodes):
            found[node.versions.get(package, "none")].append(rank)
        if len(found) > 1:
            where = "; ".join(f"{v} on {_ranks(ranks, nodes)}" for v, ranks in found.items())
            problems.append(f"{package}: versions differ between ranks ({where}). Install the same version everywhere.")
    return problems


def _versions(device: torch.device) -> dict[str, str]:
    found = package_versions()
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": str(torch.cuda.nccl.version())}  # type: ignore[no-untyped-call]
    return found


def _sharing_problems(folder: Place, nodes: list[Node]) -> list[str]:
    """Rank 0 writes a file; a rank that does not see it has another folder of that name."""
    name = [f".node-check-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    path, error = folder / name[0], ""
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, b"")
        except OSError as failure:
            error = f"checkpoint.save = {folder}: rank 0 cannot write there ({failure.strerror})."
    seen = _gathered((error, True) if error else ("", _appears(path)))
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)
    if seen[0][0]:
        return [seen[0][0]]
    blind = [rank for rank, (_, sees) in enumerate(seen) if not sees]
    if not blind:
        return []
    return [
        f"checkpoint.save = {folder}: {_ranks(blind, nodes)} do not see what rank 0 on {nodes[0].host} writes there. "
        "Checkpoints need a file system that all machines share, or an address."
    ]


def _appears(path: Place) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            files_in(path.parent)  # makes NFS refresh its cache
        time.sleep(0.1)
    return True


def _bandwidth_to_next(device: torch.device) -> float:
    """Bytes per second from this rank to the next one, while all send at once; the better of two passes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data = torch.zeros(PROBE_BYTES[device.type], dtype=torch.uint8, device=device)
    received, best_s = torch.empty_like(data), float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, data, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin)
    return data.numel() / best_s


def bandwidth_report(bandwidths: list[float], hosts: list[str]) -> list[str]:
    """Median of each kind of link, and the links that are far below it.

    Args:
        bandwidths: bytes per second from each rank to the next, the last one's to rank 0.
        hosts: of each rank.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        kinds["within a machine" if host == hosts[(rank + 1) % len(hosts)] else "between machines"].append(rank)
    lines = []
    for kind, ranks in kinds.items():
        median = statistics.median(bandwidths[rank] for rank in ranks)
        lines.append(f"bandwidth {kind}: {median / 1e9:.2f} GB/s from each rank to the next (median of {len(ranks)})")
        lines += [
            f"slow link {kind}: rank {rank} on {hosts[rank]} to rank {(rank + 1) % len(hosts)} on "
            f"{hosts[(rank + 1) % len(hosts)]}, {bandwidths[rank] / 1e9:.2f} GB/s"
            for rank in ranks
            if bandwidths[rank] < SLOW_SHARE * median
        ]
    return lines


def clock_report(times: list[float], hosts: list[str]) -> list[str]:
    """The machines whose clocks differ from the others'.

    Args:
        times: seconds since the epoch that the ranks read at one moment.
        hosts: of each rank.
    """
    median = statistics.median_low(times)
    by_host = {host: moment - median for host, moment in reversed(list(zip(hosts, times, strict=True)))}
    return [
        f"clock of {host}: {abs(delta):.1f} s {'ahead of' if delta > 0 else 'behind'} the median. Synchronize it (NTP)."
        for host, delta in sorted(by_host.items())
        if abs(delta) > CLOCK_S
    ]


def _ranks(ranks: list[int], nodes: list[Node]) -> str:
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[nodes[rank].host].append(rank)
    return ", ".join(f"{host} (ranks {', '.join(map(str, some))})" for host, some in by_host.items())


def _gathered(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
