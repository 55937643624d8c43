"""Tensors of theirs <-> one tensor of ours, for each `Arrangement`. All are permutations, so the bits do not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.links import TensorLink
from megatron_mtp.errors import ConversionError


def finite(tensor: Tensor, name: str, folder: object) -> Tensor:
    """The tensor itself.

    Raises:
        ConversionError: it holds NaN or infinite values.
    """
    if not math.isfinite(tensor.sum(dtype=torch.float64).item()):  # needs no memory, unlike isfinite of all elements
        count = int((~tensor.isfinite()).sum())
        raise ConversionError(
            f"{folder}: {name} holds {count} values that are NaN or infinite. The model is damaged, or its training "
            "diverged; take an earlier checkpoint, or download it again."
        )
    return tensor


def to_ours(link: TensorLink, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """Their tensors -> the box of `link`, with its leading axes.

    Args:
        tensors: those of `link.theirs`, in order.
        model: finalized.

    Example: by_group with two groups: q = [q0 q1 q2 q3], k = [k0 k1], v = [v0 v1] (heads of rows) ->
        [q0 q1 k0 v0 q2 q3 k1 v1].
    """
    groups = model.num_query_groups
    if link.arrangement == "by_group_gated":
        query, *rest = tensors
        tensors = [_heads(query, model, (-1, 2)).transpose(1, 2).flatten(0, 3), *rest]
    if link.arrangement in ("by_group", "by_group_gated"):
        box = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
    elif link.arrangement == "swap_halves":
        box = swap_halves(tensors[0])
    elif link.arrangement == "part":
        box = rows_of(tensors[0], link).flatten(0, 1)
    else:
        (box,) = tensors
    return box.reshape(link.size)


def to_theirs(link: TensorLink, box: Tensor, model: ModelConfig) -> list[Tensor]:
    """The inverse of `to_ours`, except for arrangement `part`, whose box is some rows of theirs."""
    full = box.reshape(link.size[len(link.size) - len(link.theirs[0].shape) :])
    if link.arrangement in ("by_group", "by_group_gated"):
        groups = model.num_query_groups
        rows = [hf.shape[0] // groups for hf in link.theirs]
        parts = [part.flatten(0, 1) for part in full.unflatten(0, (groups, -1)).split(rows, dim=1)]
        if link.arrangement == "by_group_gated":
            parts[0] = _heads(parts[0], model, (2, -1)).transpose(1, 2).flatten(0, 3)
        return parts
    if link.arrangement == "swap_halves":
        return [swap_halves(full)]
    return [full]


def rows_of(tensor: Tensor, link: TensorLink) -> Tensor:
    """The rows that a link of arrangement `part` uses of `tensor`, as a view: [groups, rows, ...]."""
    assert link.rows is not None
    return tensor.unflatten(0, (link.rows.groups, -1))[:, link.rows.start : link.rows.stop]


def swap_halves(tensor: Tensor) -> Tensor:
    """[rows, left | right] -> [rows, right | left]."""
    left, right = tensor.chunk(2, dim=1)
    return torch.cat([right, left], dim=1)


def _heads(query: Tensor, model: ModelConfig, inner: tuple[int, int]) -> Tensor:
    """Rows of queries and gates -> [groups, *inner, head, ...]."""
    return query.unflatten(0, (model.num_query_groups, *inner, model.kv_channels))
