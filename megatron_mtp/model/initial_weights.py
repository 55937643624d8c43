"""Initial weights that depend on the seed and the parameter's name only, so every layout starts from the same model.

A parameter's place in the full tensor is read from the model's sharded state dict: key, global shape, offset. Values
are drawn in blocks of rows, each from its own generator, so that a rank draws its own rows only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_mtp.model.sharded import sharded_tensors

BLOCK_ROWS = 256
# Megatron-Core scales these by 1 / sqrt(2 * num_layers): they write into the residual stream.
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")
DECAY = ".A_log"
"""The decay of a head of linear attention: the logarithm of a number drawn uniformly from 1 to 16."""
CONVOLUTION = ".conv1d.weight."
"""The short convolution of linear attention: uniform in +-1/sqrt(taps), torch's own choice."""


def fill_initial_weights(chunks: list[nn.Module], *, seed: int, std: float, num_layers: int) -> None:
    """Overwrites every matrix of the model; vectors (norms, biases) keep the constants they were built with.

    Args:
        chunks: the model chunks of this rank, before DDP and the optimizer copy their weights.
        seed: of the run.
        std: standard deviation; outputs into the residual stream get std / sqrt(2 * num_layers).
        num_layers: decoder layers of the full model.
    """
    with torch.no_grad():
        for chunk in chunks:
            for shard in sharded_tensors(chunk):
                if is_drawn(shard):
                    shard.data.copy_(initial_values(shard, seed=seed, std=std, num_layers=num_layers))


def is_drawn(shard: ShardedTensor) -> bool:
    """Whether a tensor starts from random numbers; others keep the constants they were built with."""
    is_matrix = len(shard.global_shape) - shard.prepend_axis_num >= 2 and shard.data.is_floating_point()
    return is_matrix or shard.key.endswith(DECAY) or CONVOLUTION in shard.key


def initial_values(shard: ShardedTensor, *, seed: int, std: float, num_layers: int) -> Tensor:
    """Values in fp32 of a shard that starts from random numbers. Arguments as `fill_initial_weights`."""
    if shard.key.endswith(DECAY):
        return torch.log(1 + 15 * _draw_shard(shard, seed, torch.rand))
    if CONVOLUTION in shard.key:
        return (2 * _draw_shard(shard, seed, torch.rand) - 1) / math.sqrt(shard.data.shape[-1])
    return _draw_shard(shard, seed, torch.randn) * std_of(shard.key, std, num_layers)


def _draw_shard(shard: ShardedTensor, seed: int, draw: Callable[..., Tensor]) -> Tensor:
    lead = shard.prepend_axis_num
    size = shard.data.shape[-len(shard.global_shape) + lead :]
    return draw_box(shard.key, shard.global_shape, shard.global_offset, size, lead, seed, draw).reshape(
        shard.data.shape
    )


def std_of(key: str, std: float, num_layers: int) -> float:
    """Standard deviation of a matrix."""
    return std / math.sqrt(2 * num_layers) if key.endswith(RESIDUAL_OUTPUTS) else std


def draw_box(
    key: str,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    size: tuple[int, ...],
    lead: int,
    seed: int,
    draw: Callable[..., Tensor] = torch.randn,
) -> Tensor:
    """Values of a box of a full tensor in fp32, from `draw` (standard normal); the same at every layout.

    Args:
        key: of the tensor in the sharded state dict.
        shape: of the full tensor, `lead` prepended axes (layer, expert) included.
        offset: where the box begins, on as many axes.
        size: of the box after the prepended axes, of which it takes one step each.

    Rows are the first axis after the prepended ones; the rest is one row.
    """
    outer = offset[:lead]
    rows, *inner = shape[lead:]
    first_row, *inner_offset = offset[lead:]
    local_rows, *inner_local = size
    blocks = []
    for block in range(first_row // BLOCK_ROWS, (first_row + local_rows - 1) // BLOCK_ROWS + 1):
        generator = torch.Generator().manual_seed(_block_seed(seed, key, outer, block))
        values = draw(min(BLOCK_ROWS, rows - block * BLOCK_ROWS), *inner, generator=generator)
        low = max(first_row - block * BLOCK_ROWS, 0)
        high = min(first_row + local_rows - block * BLOCK_ROWS, BLOCK_ROWS)
        blocks.append(values[low:high])
    box = torch.cat(blocks)
    for axis, (start, length) in enumerate(zip(inner_offset, inner_local, strict=True), start=1):
        box = box.narrow(axis, start, length)
    return box


def _block_seed(seed: int, key: str, outer: tuple[int, ...], block: int) -> int:
    text = f"{seed}|{key}|{','.join(map(str, outer))}|{block}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
