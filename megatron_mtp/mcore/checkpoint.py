"""Megatron-Core's sharded state in the form of torch's distributed checkpoints."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_dist


def to_torch_items(sharded_state_dict: ShardedStateDict) -> dict[str, Any]:
    """The shards of which this rank is the main replica, by key, in the form that torch's checkpoints take."""
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
        sharded_state_dict, keep_only_main_replica=True
    )
    return torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=False)
