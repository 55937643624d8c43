"""Initial weights that depend on the seed and the parameter's name only, so every layout starts from the same model.

A parameter's place in the whole tensor is read from the model's sharded state dict: key, global shape, offset. Values are drawn
in blocks of rows, each from its own generator, so that a rank draws its own rows only.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_mtp.model.sharded import sharded_tensors

BLOCK_ROWS = 256
# Megatron-Core scales these by 1 / sqrt(2 * num_layers): they write into the residual stream.
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def fill_initial_weights(chunks: list[nn.Module], *, seed: int, std: float, num_layers: int) -> None:
    """Overwrites every matrix of the model; vectors (norms, biases) keep the constants they were built with.

    Args:
        chunks: the model chunks of this rank, before DDP and the optimizer copy their weights.
        seed: of the run.
        std: standard deviation; outputs into the residual stream get std / sqrt(2 * num_layers).
        num_layers: decoder layers of the whole model.
    """
    with torch.no_grad():
        for chunk in chunks:
            for shard in sharded_tensors(chunk):
                if len(shard.global_shape) - shard.prepend_axis_num < 2 or not shard.data.is_floating_point():
                    continue
                scale = std / math.sqrt(2 * num_layers) if shard.key.endswith(RESIDUAL_OUTPUTS) else std
                shard.data.copy_(_draw(shard, seed) * scale)


def _draw(shard: ShardedTensor, seed: int) -> Tensor:
    """Standard normal values of this shard. Rows are the first axis after the prepended ones; the rest is one row."""
    lead = shard.prepend_axis_num
    outer = shard.global_offset[:lead]
    rows, *inner = shard.global_shape[lead:]
    first_row, *inner_offset = shard.global_offset[lead:]
    local_rows, *inner_local = shard.data.shape[-len(shard.global_shape) + lead :]
    blocks = []
    for block in range(first_row // BLOCK_ROWS, (first_row + local_rows - 1) // BLOCK_ROWS + 1):
        generator = torch.Generator().manual_seed(_block_seed(seed, shard.key, outer, block))
        values = torch.randn(min(BLOCK_ROWS, rows - block * BLOCK_ROWS), *inner, generator=generator)
        low = max(first_row - block * BLOCK_ROWS, 0)
        high = min(first_row + local_rows - block * BLOCK_ROWS, BLOCK_ROWS)
        blocks.append(values[low:high])
    whole = torch.cat(blocks)
    for axis, (offset, size) in enumerate(zip(inner_offset, inner_local, strict=True), start=1):
        whole = whole.narrow(axis, offset, size)
    return whole.reshape(shard.data.shape).to(shard.data.dtype)


def _block_seed(seed: int, key: str, outer: tuple[int, ...], block: int) -> int:
    text = f"{seed}|{key}|{','.join(map(str, outer))}|{block}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
