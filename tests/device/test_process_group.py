"""Picking a device and joining a group, from the environment or alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.config.sections import DistConfig
from megatron_mtp.device import cpu_facade, process_group
from megatron_mtp.device.select import pick_device
from megatron_mtp.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    process_group.destroy_distributed()
    torch.set_num_threads(threads)


def test_cpu_is_picked_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = pick_device("auto")
    assert (device.torch_device.type, device.name, device.backend, device.is_cuda) == ("cpu", "cpu", "gloo", False)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"sees no GPU\. Use dist\.device = cpu"):
        pick_device("cuda")


def test_more_local_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own, torch sees 2"):
        pick_device("auto")


def test_a_process_alone_is_a_group_of_one_and_can_come_back(alone):
    for _ in range(2):
        device = process_group.init_distributed(DistConfig(device="cpu", num_threads=1))
        assert device.torch_device == cpu_facade.installed() == torch.device("cpu")
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert torch.get_num_threads() == 1
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
        process_group.destroy_distributed()
        assert not dist.is_initialized()
        assert cpu_facade.installed() is None


def test_cores_are_divided_between_local_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    for ranks, threads in (("1", 9), ("2", 4), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert process_group.cores_per_rank() == threads


JOIN = """
import pathlib, sys
import torch, torch.distributed as dist
from megatron_mtp.config.sections import DistConfig
from megatron_mtp.device.process_group import destroy_distributed, init_distributed
init_distributed(DistConfig(device="cpu", num_threads=1))
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
pathlib.Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(str(int(total)))
destroy_distributed()
"""


@pytest.mark.dist
def test_torchrun_processes_join_one_group(tmp_path):
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3", "3"]
