"""Picks the device of a process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_mtp.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """The device of one process.

    Attributes:
        torch_device: cuda:N or cpu.
        name: as the vendor writes it ("NVIDIA H100 80GB HBM3"), or "cpu"; the key of the table of peak speeds.
        backend: of torch.distributed. NCCL (RCCL on AMD) for tensors on a GPU, gloo for tensors on the CPU.
    """

    torch_device: torch.device
    name: str
    backend: Literal["cpu:gloo,cuda:nccl", "gloo"]

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU; torch calls AMD's cuda too."""
        return self.torch_device.type == "cuda"


def local_rank() -> int:
    """Rank of this process on its machine, from torchrun; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of the job on this machine, from torchrun; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_device(wanted: Literal["auto", "cuda", "cpu"] = "auto") -> Device:
    """The device of this process: a GPU of its own where there is one, else the CPU.

    Args:
        wanted: dist.device of the config.

    Raises:
        ConfigError: "cuda" is wanted and torch sees no GPU, or more local ranks than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return Device(torch.device("cpu"), "cpu", "gloo")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ConfigError(
            f"dist.device = cuda: torch {torch.__version__} ({built}) sees no GPU. Use dist.device = cpu."
        )
    rank, count = local_rank(), torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(
            f"dist.device = {wanted}: local rank {rank} has no GPU of its own, torch sees {count}. "
            f"Start at most {count} ranks on this machine, or use dist.device = cpu."
        )
    return Device(torch.device("cuda", rank), torch.cuda.get_device_name(rank), "cpu:gloo,cuda:nccl")
