"""Loads weights of a Hugging Face folder or a checkpoint into built model chunks, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mtp.checkpoint.directory import checkpoint_folder
from megatron_mtp.checkpoint.kept_files import HF_CONFIG_NAME
from megatron_mtp.checkpoint.pretrained import load_model_weights
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.hf_config import model_config_from_hf
from megatron_mtp.convert.importing import HFModel, plan_hf
from megatron_mtp.convert.links import TensorLink
from megatron_mtp.convert.side_files import read_config
from megatron_mtp.convert.warm_start import MTPInit
from megatron_mtp.model.sharded import sharded_tensors, unwrap
from megatron_mtp.recipes.common import pretrain_common
from megatron_mtp.storage.address import is_address
from megatron_mtp.storage.place import Place


def is_hf_folder(source: str | Place) -> bool:
    """Whether a folder is a Hugging Face model: it has a config.json."""
    return not is_address(source) and (Path(str(source)) / HF_CONFIG_NAME).is_file()


def config_of(source: str | Place) -> ConfigContainer:
    """The config of the model in a folder, for one rank and not finalized.

    Args:
        source: Hugging Face folder, run directory, or the folder of one checkpoint.

    Raises:
        ConversionError, CheckpointError: it is none of these, or needs something that is not supported.
    """
    if is_hf_folder(source):
        cfg = pretrain_common()
        cfg.model = model_config_from_hf(read_config(Path(str(source))))
        cfg.precision.dtype = "fp32"
    else:
        cfg = StoredWeights(source, verify=False).config()
        for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
            setattr(cfg.model, f"{name}_parallel_size", 1)
        cfg.model.update(virtual_pipeline_model_parallel_size=None, expert_tensor_parallel_size=None)
        cfg.model.pipeline_model_parallel_layout = "auto"
        cfg.model.sequence_parallel = False
    return cfg


def load_weights(
    chunks: Sequence[nn.Module],
    source: str | Place,
    cfg: ConfigContainer,
    groups: ProcessGroupCollection,
    *,
    mtp_init: MTPInit | None = None,
) -> None:
    """Overwrites every weight of this rank's chunks, in their dtype.

    Args:
        chunks: from `build_model`, bare or wrapped. An existing optimizer keeps its own copies.
        source: Hugging Face folder, run directory, or the folder of one checkpoint.
        cfg: finalized config of the chunks.
        groups: process groups. All ranks load a checkpoint together; each loads a Hugging Face folder by itself.
        mtp_init: how to initialise MTP layers that a Hugging Face folder lacks.

    Raises:
        ConversionError, CheckpointError: names what does not fit. Weights may be partly loaded.
    """
    if not is_hf_folder(source):
        load_model_weights(checkpoint_folder(source), list(chunks), groups.dp_cp)
        return
    plan = plan_hf(Path(str(source)), cfg, mtp_init=mtp_init)
    by_key: dict[str, list[tuple[TensorLink, bool | None]]] = {}
    for link in plan.links:
        by_key.setdefault(link.key, []).append((link, None))
    for link, copies in plan.new_links:
        by_key.setdefault(link.key, []).append((link, copies))
    with torch.no_grad():
        for chunk in chunks:
            for shard in sharded_tensors(unwrap(chunk)):
                _fill(shard, by_key[shard.key], plan, mtp_init)


def _fill(
    shard: ShardedTensor, sources: list[tuple[TensorLink, bool | None]], plan: HFModel, mtp_init: MTPInit | None
) -> None:
    lead = shard.prepend_axis_num
    size = (1,) * lead + tuple(shard.data.shape[-len(shard.global_shape) + lead :])
    target = shard.data.reshape(size) if shard.data.is_contiguous() else torch.empty(size, dtype=shard.data.dtype)
    filled = 0
    for link, copies in sources:
        ours, theirs = [], []
        for o, n, p, m in zip(shard.global_offset, size, link.offset, link.size, strict=True):
            low, high = max(o, p), min(o + n, p + m)
            ours.append(slice(low - o, high - o))
            theirs.append(slice(low - p, high - p))
        if any(part.start >= part.stop for part in ours):
            continue
        box = plan.read(link) if copies is None else plan.initial(link, copies, mtp_init)
        part = box[tuple(theirs)]
        target[tuple(ours)] = part.to(target.dtype).to(target.device)
        filled += part.numel()
    assert filled == target.numel(), f"{shard.key}: {filled} of {target.numel()} values have a source"
    if target.data_ptr() != shard.data.data_ptr():
        shard.data.copy_(target.reshape(shard.data.shape))
