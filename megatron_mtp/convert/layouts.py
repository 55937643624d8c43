"""Tensors of theirs <-> one tensor of ours, for each `Layout`. Every function is a permutation: its inverse gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mtp.convert.links import Link


def to_ours(link: Link, tensors: list[Tensor], num_groups: int) -> Tensor:
    """Their tensors -> the box of `link`, with its leading axes.

    Args:
        tensors: of `link.sources`, in order.
        num_groups: key/value heads.

    Example: by_group with two groups: q = [q0 q1 q2 q3], k = [k0 k1], v = [v0 v1] (heads of rows) ->
        [q0 q1 k0 v0 q2 q3 k1 v1].
    """
    if link.layout == "by_group":
        box = torch.cat([tensor.unflatten(0, (num_groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
    elif link.layout == "swap_halves":
        box = swap_halves(tensors[0])
    else:
        (box,) = tensors
    return box.reshape(link.size)


def to_theirs(link: Link, box: Tensor, num_groups: int) -> list[Tensor]:
    """The inverse of `to_ours`."""
    whole = box.reshape(link.size[len(link.size) - len(link.sources[0].shape) :])
    if link.layout == "by_group":
        rows = [source.shape[0] // num_groups for source in link.sources]
        return [part.flatten(0, 1) for part in whole.unflatten(0, (num_groups, -1)).split(rows, dim=1)]
    if link.layout == "swap_halves":
        return [swap_halves(whole)]
    return [whole]


def swap_halves(tensor: Tensor) -> Tensor:
    """[rows, left | right] -> [rows, right | left]."""
    left, right = tensor.chunk(2, dim=1)
    return torch.cat([right, left], dim=1)
