"""Finds the newest complete checkpoint and loads it, on all ranks together."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mtp.checkpoint.agreement import describe_error, from_first, joined, raise_any
from megatron_mtp.checkpoint.content import COMMON_KEY, OPTIMIZER_PREFIX, Content
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, TRAIN_STATE_NAME, Manifest
from megatron_mtp.checkpoint.preflight import check_missing, compare_with_run, read_saved_config, refusal_text
from megatron_mtp.checkpoint.random_state import RNG_KEY, restore_random_state
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.errors import CheckpointError, MegatronMTPError
from megatron_mtp.mcore.optimizer import copy_master_weights_to_model

logger = logging.getLogger(__name__)

# A rank's random state belongs to its place in the layout; a change of any of these fields moves the places.
_PLACE_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is complete and fits the config."""

    path: Path
    manifest: Manifest


def find_checkpoint(cfg: ConfigContainer, path: str | Path) -> Found | None:
    """The newest complete checkpoint of a run directory; None where a fresh start is allowed.

    Every byte is compared with the manifest before any file is parsed, each rank reading its share. Rank 0 checks
    pickled parts before any rank loads them. A damaged checkpoint is named and the one before it is used.

    Args:
        path: checkpoint.load or checkpoint.save.

    Raises:
        CheckpointError: on every rank: no checkpoint is complete, or the newest complete one is of a run with another
            config.
    """
    directory = RunDirectory(path)
    damaged: list[str] = []
    for iteration in from_first(directory.iterations):
        manifest, problems = _examine(directory, iteration)
        if manifest is not None and not problems:
            from_first(partial(_check_config, cfg, directory, manifest))
            return Found(directory.final_path(iteration), manifest)
        for problem in problems if dist.get_rank() == 0 else ():
            logger.warning("the checkpoint of iteration %d is damaged and skipped: %s", iteration, problem)
        damaged += problems
    from_first(lambda: check_missing(cfg, damaged))
    return None


def _examine(directory: RunDirectory, iteration: int) -> tuple[Manifest | None, list[str]]:
    def read() -> tuple[Manifest | None, list[str]]:
        try:
            return directory.read(iteration), []
        except CheckpointError as error:
            return None, [str(error)]

    def check_pickled() -> list[str]:
        try:
            read_metadata(directory.final_path(iteration))
        except CheckpointError as error:
            return [str(error)]
        return []

    manifest, problems = from_first(read)
    if manifest is not None:
        problems = joined(directory.damages(manifest, share=dist.get_rank(), num_shares=dist.get_world_size()))
    return manifest, problems or (from_first(check_pickled) if manifest is not None else [])


def _check_config(cfg: ConfigContainer, directory: RunDirectory, manifest: Manifest) -> None:
    comparison = compare_with_run(cfg, directory, manifest)
    if comparison.refusals:
        raise CheckpointError(refusal_text(str(directory.path), manifest.iteration, comparison))
    for change in comparison.changes:
        logger.warning("the curve changes from iteration %d on: %s", manifest.iteration, change)


def load_checkpoint(
    cfg: ConfigContainer,
    found: Found,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    dp_cp_group: ProcessGroup,
    *,
    load_optim: bool,
) -> dict[str, Any]:
    """Fills model, optimizer and random state from a checkpoint, whatever layout saved it.

    Args:
        load_optim: with optimizer state.

    Returns:
        The saved train state.

    Raises:
        CheckpointError: on every rank. Weights may be partly loaded; the process must not continue to train.
    """
    error, saved = None, {}
    try:
        saved = json.loads((found.path / TRAIN_STATE_NAME).read_text(encoding="utf-8"))
        _load(cfg, found, chunks, optimizer, dp_cp_group, saved["optimizer"], load_optim)
    except MegatronMTPError as failure:
        error = str(failure)
    except Exception as failure:
        logger.debug("loading failed", exc_info=failure)
        error = f"{found.path}: cannot be loaded ({describe_error(failure)})."
    raise_any(error)
    return saved["train"]


def _load(
    cfg: ConfigContainer,
    found: Found,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    dp_cp_group: ProcessGroup,
    scalars: dict[str, Any],
    load_optim: bool,
) -> None:
    saved = read_saved_config(found.path / CONFIG_NAME)
    same_place = found.manifest.world_size == dist.get_world_size() and _place(saved) == _place(to_dict(cfg))
    content = Content(chunks, optimizer if load_optim else None, dp_cp_group)
    plan = content.for_loading(with_random_state=same_place)
    _check_keys(found.path, plan.requested_keys(), load_optim)
    loaded = dist_checkpointing.load(plan.state, str(found.path), validate_access_integrity=False)
    plan.adopt(loaded, scalars)
    if not load_optim:
        optimizer.reload_model_params()
    elif saved["precision"]["dtype"] != cfg.precision.dtype:
        copy_master_weights_to_model(content.singles(), chunks)
    if same_place:
        restore_random_state(loaded[RNG_KEY])


def _check_keys(path: Path, requested: set[str], load_optim: bool) -> None:
    """Compares what all ranks request with what the checkpoint holds, both ways: nothing is skipped silently."""
    wanted = set(joined(sorted(requested))) - {RNG_KEY}
    stored = {key.split("/shard_")[0] for key in read_metadata(path).state_dict_metadata} - {RNG_KEY, COMMON_KEY}
    if not load_optim:
        stored = {key for key in stored if not key.startswith(OPTIMIZER_PREFIX)}
    elif not any(key.startswith(OPTIMIZER_PREFIX) for key in stored):
        raise CheckpointError(
            f"{path}: was saved without optimizer state (checkpoint.save_optim=false). Set checkpoint.load_optim=false."
        )
    if missing := wanted - stored:
        raise CheckpointError(f"{path}: lacks {_some(missing)}, which the model needs.")
    if surplus := stored - wanted:
        raise CheckpointError(f"{path}: holds {_some(surplus)}, which the model does not have.")


def _place(config: dict[str, Any]) -> list[Any]:
    return [config["model"][name] for name in _PLACE_FIELDS] + [config["dist"]["use_tp_pp_dp_mapping"]]


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
