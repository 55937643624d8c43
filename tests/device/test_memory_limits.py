"""Limits of a process and of its cgroup, read from files like those of the kernel."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_mtp.device import memory_limits as module
from megatron_mtp.device.memory_limits import MemoryLimit, memory_limits

pytestmark = pytest.mark.unit


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture(autouse=True)
def _no_ulimit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_the_lowest_limit_of_a_cgroup_and_those_above_it_counts(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/memory.current": "5\n",
            "sys/fs/cgroup/job/memory.max": "4294967296\n",
            "sys/fs/cgroup/job/memory.current": "1073741824\n",
            "sys/fs/cgroup/memory.max": "9000000000\n",
            "sys/fs/cgroup/memory.current": "7\n",
        },
    )
    assert memory_limits(tmp_path) == [MemoryLimit("cgroup of this process (memory.max)", 2**32, 2**30)]


def test_cgroups_of_version_1_and_a_path_of_the_host(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "3\n",
        },
    )
    assert memory_limits(tmp_path) == [MemoryLimit("cgroup of this process (memory.limit_in_bytes)", 2**31, 3)]


@pytest.mark.parametrize("text", ["max", "9223372036854771712"])
def test_without_limits(tmp_path: Path, text: str):
    assert memory_limits(tmp_path) == []
    write(
        tmp_path,
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": text, "sys/fs/cgroup/memory.current": "1"},
    )
    assert memory_limits(tmp_path) == []


def test_the_limit_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (2**40, 2**41))
    (limit,) = memory_limits(tmp_path)
    assert limit.limit_bytes == 2**40
    assert "ulimit -v" in limit.name
    assert 0 < limit.used_bytes < 2**40
