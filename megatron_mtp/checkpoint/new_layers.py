"""Starts MTP layers that a checkpoint lacks; the values depend on neither layout nor number of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from torch import Tensor, nn

from megatron_mtp.checkpoint.depth_change import DepthChange
from megatron_mtp.checkpoint.stored import StoredTensors
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.depths import MTP_BLOCK
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.errors import CheckpointError
from megatron_mtp.model.initial_weights import initial_values, is_drawn
from megatron_mtp.model.sharded import sharded_tensors, unwrap
from megatron_mtp.storage.place import Place

logger = logging.getLogger(__name__)

WORTH_A_REMARK = 2.0
"""First updates of new layers that are larger than this many times those of a new run are worth a line in the log."""


class NewLayers:
    """The MTP layers of this rank's chunks, in case that a checkpoint has fewer.

    Args:
        cfg: finalized.
        chunks: as they were built: norms and biases have their initial values, which are kept here. A run that goes
            back to a checkpoint from before its layers were added starts these layers again.
    """

    def __init__(self, cfg: ConfigContainer, chunks: list[nn.Module]):
        self._cfg, self._chunks = cfg, chunks
        self._model = to_dict(cfg)["model"]
        self._vectors = {
            (shard.key, tuple(shard.global_offset)): shard.data.detach().clone()
            for shard in self._shards(lambda key: key.startswith("mtp."))
            if not is_drawn(shard)
        }

    def change_from(self, saved: dict[str, Any]) -> DepthChange:
        """What differs from a checkpoint with this config, as plain data."""
        return DepthChange.between(saved.get("model") or {}, self._model)

    def fill(self, change: DepthChange, folder: Place, optimizer_step: int | None = None) -> set[nn.Parameter]:
        """Overwrites the layers that the checkpoint lacks and logs every change; returns their parameters.

        Args:
            folder: of the checkpoint, whose layers may be copied.
            optimizer_step: updates that the optimizer goes on from; None: it starts from zero.

        Raises:
            CheckpointError: it holds no such layer, or cannot be read.
        """
        copies = change.init != "fresh" and bool(self._shards(change.is_new))
        stored = StoredTensors(folder, read_metadata(folder)) if copies else None
        with torch.no_grad():
            for shard in self._shards(change.is_new):
                source = None if stored is None else _source(shard, change, stored)
                if source is not None and stored is not None:
                    key, offset, size = source
                    shard.data.copy_(stored.read(key, offset, size).reshape(shard.data.shape))
                elif is_drawn(shard):
                    shard.data.copy_(self._drawn(shard))
                else:
                    shard.data.copy_(self._vectors[shard.key, tuple(shard.global_offset)])
        if dist.get_rank() == 0:
            for line in change.lines() + self._remarks(change, optimizer_step):
                logger.warning("%s", line)
        models = [unwrap(chunk) for chunk in self._chunks]
        return {p for model in models for name, p in model.named_parameters() if change.is_new(name)}

    def _remarks(self, change: DepthChange, optimizer_step: int | None) -> list[str]:
        options = self._cfg.optimizer
        if not change.has_new or not optimizer_step or options.optimizer != "adam":
            return []
        factor = largest_first_update(options.adam_beta1, options.adam_beta2, optimizer_step)
        if factor < WORTH_A_REMARK:
            return []
        return [
            f"Adam's bias correction counts the {optimizer_step} steps of the run, for the new layers too: their first "
            f"updates are up to {factor:.1f} times as large as those of a new run. optimizer.adam_beta2 = 0.95 keeps "
            "them below 1.1 times."
        ]

    def _shards(self, is_wanted: Callable[[str], bool]) -> list[ShardedTensor]:
        found = (shard for chunk in self._chunks for shard in sharded_tensors(unwrap(chunk)))
        return [shard for shard in found if is_wanted(shard.key)]

    def _drawn(self, shard: ShardedTensor) -> Tensor:
        model, seed = self._cfg.model, self._cfg.rng.seed
        return initial_values(shard, seed=seed, std=model.init_method_std, num_layers=model.num_layers)


def largest_first_update(beta1: float, beta2: float, step: int) -> float:
    """Largest update of Adam in the steps after `step` from moments of zero, relative to that of a new run.

    With a steady gradient g, t steps after moments of zero, the update is lr * g / |g| times
    (1 - beta1^t) / (1 - beta1^(step+t)) / sqrt((1 - beta2^t) / (1 - beta2^(step+t))); in a new run, step = 0, times 1.

    Example: after many steps it is 1.1 for betas 0.9 and 0.95, and 6.6 for 0.9 and 0.999.
    """

    def part(beta: float, t: int) -> float:
        return (1 - beta**t) / (1 - beta ** (step + t))

    return max(part(beta1, t) / math.sqrt(part(beta2, t)) for t in range(1, 1001))


Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A box in the checkpoint: key, offset, size."""


def _source(shard: ShardedTensor, change: DepthChange, stored: StoredTensors) -> Box | None:
    """The box of the checkpoint that a shard is a copy of; None: it is initialised as in a new model.

    Raises:
        CheckpointError: the checkpoint holds no such tensor, or one of another shape.
    """
    lead, shape, offset = shard.prepend_axis_num, tuple(shard.global_shape), tuple(shard.global_offset)
    size = (1,) * lead + tuple(shard.data.shape[-len(shape) + lead :])
    axes: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    if change.init == "last_depth":
        key = change.source_of(shard.key)
    else:
        name = shard.key.split(".", 3)[3]  # behind mtp.layers.N.
        if name.startswith(f"{MTP_BLOCK}mlp.") and change.has_own_mlp:
            return None
        if name.startswith(MTP_BLOCK):
            key, axes, index = _last_layer(name.removeprefix(MTP_BLOCK), stored)
        elif name.startswith("final_layernorm."):
            key = f"decoder.{name}"
        else:
            return None
    if key in stored.tensors and stored.shape(key) == axes + shape:
        return key, index + offset, (1,) * len(axes) + size
    raise CheckpointError(
        f"model.mtp_new_layers_init = {change.init}: the checkpoint holds nothing of shape {list(shape)} to copy to "
        f"{shard.key}. Use fresh."
    )


def _last_layer(name: str, stored: StoredTensors) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Where a tensor of the trunk's last layer is: key, axes before those of the tensor, and its index on them.

    Layers of one kind share tensors with a layer axis; with several kinds each layer has its own tensors.
    """
    shared = f"decoder.layers.{name}"
    if shared in stored.tensors:
        count = stored.shape(shared)[0]
        return shared, (count,), (count - 1,)
    numbers = [key.split(".")[2] for key in stored.tensors if key.startswith("decoder.layers.")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return f"decoder.layers.{last}.{name}", (), ()


def read_without(
    state: ShardedStateDict, is_new: Callable[[str], bool], read: Callable[[ShardedStateDict], dict[str, Any]]
) -> dict[str, Any]:
    """Reads shards where some are not stored: these are zeros.

    Megatron-Core's loader joins lists whose items it reads in different ways in the wrong order, so it gets a flat
    mapping.

    Args:
        state: nested dicts and lists of shards.
        is_new: whether the shards of a key are not stored.
        read: gives tensors in place of the shards of a mapping.
    """
    wanted: dict[str, Any] = {}

    def collect(item: Any, place: str) -> None:
        if isinstance(item, dict | list):
            for name, inner in _entries(item):
                collect(inner, f"{place}/{name}")
        elif not (isinstance(item, ShardedBase) and is_new(item.key)):
            wanted[place] = item

    def put(item: Any, place: str) -> Any:
        if isinstance(item, dict):
            return {name: put(inner, f"{place}/{name}") for name, inner in item.items()}
        if isinstance(item, list):
            return [put(inner, f"{place}/{index}") for index, inner in enumerate(item)]
        return loaded[place] if place in wanted else torch.zeros_like(item.data)

    collect(state, "")
    loaded = read(wanted)
    result: dict[str, Any] = put(state, "")
    return result


def _entries(item: dict[Any, Any] | list[Any]) -> Any:
    return item.items() if isinstance(item, dict) else enumerate(item)
