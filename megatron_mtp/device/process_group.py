"""Joins the processes of a job, on whatever device they have."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from megatron_mtp.config.sections import DistConfig
from megatron_mtp.device import cpu_facade
from megatron_mtp.device.select import Device, local_rank, local_world_size, pick_device


def init_distributed(config: DistConfig) -> Device:
    """Picks the device of this process and joins the process group that torchrun describes, or a group of one.

    A process that has joined a group already (a worker of `device/worker_pool.py`) stays in it. On a CPU the function
    also installs the facade over torch.cuda and divides the cores between the local ranks.

    Args:
        config: device, timeout of collectives in minutes, threads of each rank.

    Returns:
        The device of this process.

    Raises:
        ConfigError: the wanted device is not there.
    """
    device = pick_device(config.device)
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)
    else:
        cpu_facade.install("cpu")
    if threads := config.num_threads or (None if device.is_cuda else cores_per_rank()):
        torch.set_num_threads(threads)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if dist.is_initialized():
        return device
    if launched_by_torchrun():
        dist.init_process_group(device.backend, timeout=timeout, **_own_store(timeout))
    else:
        # A store inside the process: no port that another job could hold.
        dist.init_process_group(device.backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """Arguments of init_process_group that separate the keys of this start of the ranks from those of earlier starts.

    By default all starts under one torchrun share its store, and torch 2.15 gives their keys no prefix: after a restart
    ranks find the addresses of dead ranks and cannot connect.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, env_world_size(), is_master=False, timeout=timeout)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": PrefixStore(f"megatron_mtp/start_{start}", store),
        "rank": env_rank(),
        "world_size": env_world_size(),
    }


def destroy_distributed() -> None:
    """Leaves the process group and uninstalls the facade, where they exist."""
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu_facade.uninstall()


def launched_by_torchrun() -> bool:
    """Whether the environment describes a job of several processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """Global rank from the environment, known before any process group exists; 0 without torchrun."""
    return int(os.environ.get("RANK", str(local_rank())))


def env_world_size() -> int:
    """Number of processes from the environment, known before any process group exists; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def job_size() -> int:
    """Number of processes of the job: of the group that this process has joined, or from the environment."""
    return dist.get_world_size() if dist.is_initialized() else env_world_size()


def cores_per_rank() -> int:
    """Cores this process may use, divided by the local ranks; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())
