"""One rank of a job of any size, in one process: collectives that do nothing, tensors that hold nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_mtp.device import cpu_facade
from megatron_mtp.mcore.patches import replaced


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[torch.device]:
    """Inside, this process is `rank` of `world_size`, and "cuda" and the default device mean the meta device.

    Models are built with the shapes that this rank would hold, and no memory. The caller destroys what Megatron-Core
    keeps in globals (`mcore.groups.destroy_model_parallel`) before leaving.

    Args:
        rank: 0 .. world_size - 1; any number of ranks can be visited one after the other.
        world_size: processes of the pretended job.

    Yields:
        torch.device("meta").
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend "fake"

    assert not dist.is_initialized(), "a fake world cannot be made inside a process group"
    before = cpu_facade.installed()
    if before is not None:
        cpu_facade.uninstall()
    cpu_facade.install("meta")
    try:
        with replaced(sys, excepthook=sys.excepthook):  # torch wraps it for each group, to name the rank in every line
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
            try:
                # Routers and rotary embeddings name no device at all: the default device must be meta as well.
                with torch.device("meta") as device:
                    yield device
            finally:
                dist.destroy_process_group()
    finally:
        cpu_facade.uninstall()
        if before is not None:
            cpu_facade.install(before)
