"""Megatron-Core's sharded state in the form of torch's distributed checkpoints."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed import checkpoint
from torch.distributed.checkpoint import StorageReader


def to_torch_items(sharded_state_dict: ShardedStateDict) -> dict[str, Any]:
    """The shards of which this rank is the main replica, by key, in the form that torch's checkpoints take."""
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
        sharded_state_dict, keep_only_main_replica=True
    )
    return torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=False)


def load_shards(sharded_state_dict: ShardedStateDict, reader: StorageReader) -> dict[str, Any]:
    """The state dict with tensors in place of shards, read by any reader.

    Megatron-Core's `dist_checkpointing.load` makes its own reader, of files. These are its steps, without the common
    state, which holds nothing of ours. No collective.

    Raises:
        CheckpointException: torch cannot read it.
        OSError: the storage refused.
    """
    shards, result, factories = load_preprocess(sharded_state_dict)
    shards, _ = extract_sharded_base(shards)
    tensors = [shard for shard in nested_values(shards) if isinstance(shard, ShardedTensor)]
    by_key, flat_mapping, rename_mapping = torch_dist._replace_state_dict_keys_with_sharded_keys(shards)
    items = torch_dist.mcore_to_pyt_state_dict(by_key, True)
    planner = torch_dist.MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[shard for shard in tensors if not shard.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={shard.key: shard for shard in tensors if shard.allow_shape_mismatch},
        stream_ckpt_dequant=True,
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    checkpoint.load(items, reader, planner=planner, no_dist=True)
    loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(item) for key, item in items.items()}
    loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
    torch_dist._restore_dict_types(loaded, shards)
    merge(result, loaded)
    return apply_factory_merges(result, factories)
