"""The parameters of a chunk as parts of full tensors: key, global shape, offset, and a view of the local part.

Megatron-Core's sharded state dict gives this for every parallelism. Initial weights and the comparison of gradients
between layouts are built on it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


def sharded_tensors(chunk: MegatronModule) -> list[ShardedTensor]:
    """Every tensor of a chunk, sorted by key and offset; fused ones (gate and up projection) are split."""
    found: list[ShardedTensor] = []
    pending: list[object] = [chunk.sharded_state_dict()]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, ShardedTensorFactory):
            pending.append(item.build())
        elif isinstance(item, ShardedTensor) and item.data is not None:
            found.append(item)
    return sorted(found, key=lambda shard: (shard.key, shard.global_offset))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a full tensor, held by some rank.

    `name` is the key, followed by @ and the index on prepended axes (layer, expert):
    "decoder.layers.mlp.linear_fc1.weight@3".
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    @classmethod
    def of(cls, shard: ShardedTensor) -> Part:
        """A copy of the shard on the CPU."""
        lead = shard.prepend_axis_num
        index = ",".join(map(str, shard.global_offset[:lead]))
        return cls(
            f"{shard.key}@{index}" if lead else shard.key,
            tuple(shard.global_shape[lead:]),
            tuple(shard.global_offset[lead:]),
            shard.data.detach().cpu().clone(),
        )


def parameter_parts(chunks: list[nn.Module]) -> list[Part]:
    """This rank's parts of all parameters and buffers."""
    return [Part.of(shard) for chunk in chunks for shard in sharded_tensors(unwrap(chunk))]


def gradient_parts(chunks: list[nn.Module]) -> list[Part]:
    """This rank's parts of all reduced gradients; call it after the gradients were finalized, before the update."""
    parts = []
    for chunk in chunks:
        _gather_sharded_gradients(chunk)
        with gradients_in_place_of_weights(chunk) as names:
            model = unwrap(chunk)
            pointers = {parameter.data.untyped_storage().data_ptr() for parameter in names}
            shards = sharded_tensors(model)
            parts += [Part.of(s) for s in shards if s.data.untyped_storage().data_ptr() in pointers]
    return parts


@contextmanager
def gradients_in_place_of_weights(chunk: DistributedDataParallel) -> Iterator[list[nn.Parameter]]:
    """Swaps copies of the gradients in for the trainable weights, whose parameters it yields, until the block ends."""
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        # A storage of its own for each, so that they can be distinguished from weights and buffers in the state dict.
        parameter.data = parameter.main_grad.detach().to(parameter.dtype).clone()
    try:
        yield parameters
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _gather_sharded_gradients(chunk: DistributedDataParallel) -> None:
    """With the distributed optimizer a rank holds the reduced gradients of its shard only; this gathers the others'."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            shard = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


@dataclass(frozen=True, slots=True)
class GradientRange:
    """Elements of a parameter's gradient that this rank holds in reduced form and that no other rank counts.

    Args:
        name: of the parameter in the whole model, such as `decoder.layers.3.mlp.experts.7.linear_fc1.weight`.
        parameter: has Megatron-Core's `main_grad`.
        start, stop: elements of the flattened gradient.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def gradient(self) -> Tensor:
        """[stop - start], a view."""
        gradient: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]  # set by Megatron-Core
        return gradient.view(-1)[self.start : self.stop]


def gradient_ranges(chunks: list[DistributedDataParallel]) -> list[GradientRange]:
    """This rank's share of the gradient of the whole model: over all ranks, each element of it is in one range.

    Copies on other tensor-, data- and context-parallel ranks, and those of a tied or shared embedding, are left out.
    With the distributed optimizer a rank has the elements of its own shard.
    """
    found = []
    for chunk in chunks:
        owned = _owned_elements(chunk)
        places = {parameter.data_ptr(): parameter for parameter in owned}
        starts = sorted(places)
        for shard in sharded_tensors(unwrap(chunk)):
            index = bisect_right(starts, shard.data.data_ptr()) - 1
            parameter = places[starts[index]] if index >= 0 else None
            if parameter is None or (first := _first_element(shard.data, parameter)) is None:
                continue  # a buffer, or a frozen parameter
            assert shard.data.is_contiguous(), f"{shard.key}: its elements are not next to each other"
            *copy, data_rank = shard.replica_id
            low, high, is_sharded = owned[parameter]
            if any(copy) or (data_rank and not is_sharded):
                continue
            start, stop = max(first, low), min(first + shard.data.numel(), high)
            if start < stop:
                found.append(GradientRange(_whole_name(shard), parameter, start, stop))
    return found


def _owned_elements(chunk: DistributedDataParallel) -> dict[nn.Parameter, tuple[int, int, bool]]:
    """Trainable parameter -> first and last + 1 element of its gradient that is reduced here, and whether others hold
    the rest."""
    owned = {}
    is_sharded = chunk.ddp_config.use_distributed_optimizer
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        for bucket in group.buckets:
            length, rank = bucket.grad_data.numel(), 0
            if is_sharded:
                ranks = group.intra_distributed_optimizer_instance_group
                length, rank = length // ranks.size(), ranks.rank()
            for parameter, (begin, end) in bucket.param_to_index.items():
                low, high = max(begin, rank * length), min(end, (rank + 1) * length)
                owned[parameter] = (low - begin, max(low, high) - begin, is_sharded)
    return owned


def _first_element(view: Tensor, parameter: nn.Parameter) -> int | None:
    """Place of a view's first element in a parameter; None: it is not a view of it."""
    first, rest = divmod(view.data_ptr() - parameter.data_ptr(), parameter.element_size())
    return first if rest == 0 and first + view.numel() <= parameter.numel() else None


def _whole_name(shard: ShardedTensor) -> str:
    """The key of a shard, with the indices of layer and expert, which it may hold as offsets, in their places.

    Examples: `decoder.layers.mlp.linear_fc1.weight` of layer 3 is `decoder.layers.3.mlp.linear_fc1.weight`, and
    `mtp.layers.0.mlp.experts.experts.linear_fc1.weight` of expert 7 is `mtp.layers.0.mlp.experts.7.linear_fc1.weight`.
    """
    name, indices = shard.key, [str(offset) for offset in shard.global_offset[: shard.prepend_axis_num]]
    if indices and not re.search(r"\blayers\.\d", name):
        name = name.replace("layers.", f"layers.{indices.pop(0)}.", 1)
    return name.replace(".experts.experts.", f".experts.{indices[0]}.") if indices else name


def whole_tensors(parts: list[Part]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Assembles parts from all ranks.

    Returns:
        name -> full tensor, and name -> largest difference between two copies of the same part (0 where all agree).

    Raises:
        ValueError: no rank holds some part of a tensor.
    """
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    spread: dict[str, float] = {}
    for part in parts:
        target = whole.setdefault(part.name, torch.zeros(part.global_shape, dtype=part.data.dtype))
        seen = filled.setdefault(part.name, torch.zeros(part.global_shape, dtype=torch.bool))
        box = tuple(slice(o, o + n) for o, n in zip(part.offset, part.data.shape, strict=True))
        difference = (target[box] - part.data).abs()[seen[box]]
        spread[part.name] = max(spread.get(part.name, 0.0), float(difference.max()) if difference.numel() else 0.0)
        target[box] = part.data
        seen[box] = True
    holes = [key for key, seen in filled.items() if not seen.all()]
    if holes:
        raise ValueError(f"no rank holds some part of {', '.join(holes)}")
    return whole, spread


def gather_parts(parts: list[Part]) -> list[Part] | None:
    """All ranks' parts on rank 0, in order of rank; None elsewhere."""
    gathered: list[list[Part]] | None = [[] for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered)
    return None if gathered is None else [part for rank_parts in gathered for part in rank_parts]


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DDP and mixed-precision wrappers."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module
