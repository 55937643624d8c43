"""Limits at which memory ends for this process, though the machine may have more."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

NO_LIMIT = 2**60
"""Kernels write "no limit" as a number above this one."""
# Version of cgroups -> (its controller in /proc/self/cgroup, its folder, file of the limit, file of the use).
CGROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit, where it is set, and how much of it is in use."""

    name: str
    limit_bytes: int
    used_bytes: int


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The limit of the address space of this process, and the lowest one of its cgroup and those above it, where set.

    Args:
        root: where `proc` and `sys` are.
    """
    found = []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        found.append(MemoryLimit("address space of this process (ulimit -v)", limit, used))
    in_cgroups = [one for cgroup in _cgroups(root) if (one := _cgroup_limit(*cgroup)) is not None]
    return found + sorted(in_cgroups, key=lambda one: one.limit_bytes)[:1]


def _cgroups(root: Path) -> list[tuple[Path, str, str]]:
    """Folders of the cgroup of this process and of those above it, with the names of the files there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, place, limit, used in CGROUPS:
            if controller in controllers.split(","):
                folder = root / place
                # In a container the path may be that of the host: then only the top is there.
                inner = [folder / path.lstrip("/"), *(folder / path.lstrip("/")).parents]
                found += [(one, limit, used) for one in inner if one.is_relative_to(folder)]
    return found


def _cgroup_limit(folder: Path, limit_file: str, used_file: str) -> MemoryLimit | None:
    try:
        limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
    except (OSError, ValueError):  # not there, or not readable
        return None
    if not limit.isdecimal() or int(limit) >= NO_LIMIT:
        return None
    return MemoryLimit(f"cgroup of this process ({limit_file})", int(limit), used)
