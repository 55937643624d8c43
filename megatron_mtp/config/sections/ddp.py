"""Data parallelism and the sharding of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import knob


@dataclass(kw_only=True, slots=True)
class DDPConfig(Section):
    """Data parallelism and the sharding of the optimizer."""

    SECTION: ClassVar[str] = "ddp"

    use_distributed_optimizer: bool = True
    """Shards optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = knob(False, resume="free", phase="free")
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = knob(False, resume="free", phase="free")
    """Gather updated weights while the next forward pass runs; needs the distributed optimizer."""
    bucket_size: int | None = knob(None, ge=1, le=2**40, resume="free", phase="free")
    """Parameters in one communication bucket; None: Megatron's rule."""
    check_for_nan_in_grad: bool = knob(False, resume="free")
    """Stop at a NaN in a local gradient before it is reduced."""
    use_megatron_fsdp: bool = False
    """Not supported; refused by name."""
    use_torch_fsdp2: bool = False
    """Not supported; refused by name."""
