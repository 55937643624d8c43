"""Finds the newest complete checkpoint and loads it, on all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from megatron_mtp.checkpoint.agreement import describe_error, gather_lists, raise_any, run_on_rank_0
from megatron_mtp.checkpoint.changes import free_changes, rate_change
from megatron_mtp.checkpoint.content import COMMON_KEY, OPTIMIZER_PREFIX, Content, LoadPlan
from megatron_mtp.checkpoint.depth_change import DepthChange
from megatron_mtp.checkpoint.directory import RunDirectory, resume_candidates, split_name
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, Manifest
from megatron_mtp.checkpoint.new_layers import NewLayers, read_without
from megatron_mtp.checkpoint.place_reader import PlaceReader
from megatron_mtp.checkpoint.preflight import (
    check_missing,
    compare_with_run,
    read_saved_config,
    refusal_text,
    saved_phase,
)
from megatron_mtp.checkpoint.random_state import RNG_KEY, restore_random_state
from megatron_mtp.checkpoint.train_state import read_train_state
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.phases import BASE
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.errors import CheckpointError, MegatronMTPError
from megatron_mtp.mcore.checkpoint import load_shards
from megatron_mtp.mcore.optimizer import copy_master_weights_to_model, set_master_weights
from megatron_mtp.storage.place import Place

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

    path: Place
    manifest: Manifest


class UnreadableError(CheckpointError):
    """A checkpoint with the right checksums that cannot be read all the same."""


def load_newest(
    cfg: ConfigContainer,
    path: str | Place,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    dp_cp_group: ProcessGroup,
    new_layers: NewLayers,
    *,
    load_optim: bool,
    phase: str = BASE,
) -> tuple[Found, dict[str, Any]] | None:
    """Loads the newest complete checkpoint of a run directory; None where a fresh start is allowed.

    Args:
        path: checkpoint.load or checkpoint.save; `RUN@which` is that one checkpoint.
        new_layers: starts MTP layers that the checkpoint lacks.
        load_optim: with optimizer state.
        phase: name of the phase that `cfg` is for.

    Returns:
        The checkpoint and its train state.

    Raises:
        CheckpointError: on every rank: no checkpoint is complete, the newest complete one is of a run with another
            config, or it cannot be loaded. Weights may be partly loaded; the process must not continue to train.
    """
    damaged: list[str] = []
    for found in complete_checkpoints(cfg, path, damaged, phase):
        try:
            # A failed attempt leaves nothing behind: the next one fills everything again.
            state = load_checkpoint(cfg, found, chunks, optimizer, dp_cp_group, new_layers, load_optim=load_optim)
            return found, state
        except UnreadableError as error:
            _skip(found.manifest.iteration, [str(error)], damaged)
    return None


def complete_checkpoints(
    cfg: ConfigContainer, path: str | Place, damaged: list[str], phase: str = BASE
) -> Iterator[Found]:
    """The complete checkpoints of a run directory, newest first; ends where a fresh start is allowed.

    Every byte is compared with the manifest before any file is parsed, each rank reading its share. Rank 0 checks the
    train state and pickled parts before any rank loads them. A damaged checkpoint is named and the one before it used.

    Args:
        path: checkpoint.load or checkpoint.save.
        damaged: the problems of all that are skipped are added to it.
        phase: name of the phase that `cfg` is for.

    Raises:
        CheckpointError: on every rank: no checkpoint is left, or the newest one that is complete is of a run with
            another config.
    """
    directory = RunDirectory(split_name(path)[0])
    for iteration in run_on_rank_0(lambda: resume_candidates(path)[1]):
        manifest, problems = _examine(directory, iteration)
        if manifest is not None and not problems:
            run_on_rank_0(partial(_check_config, cfg, directory, manifest, phase))
            yield Found(directory.final_path(iteration), manifest)
        else:
            _skip(iteration, problems, damaged)
    run_on_rank_0(lambda: check_missing(cfg, damaged))


def _skip(iteration: int, problems: list[str], damaged: list[str]) -> None:
    for problem in problems if dist.get_rank() == 0 else ():
        logger.warning("the checkpoint of iteration %d is damaged and skipped: %s", iteration, problem)
    damaged += problems


def _examine(directory: RunDirectory, iteration: int) -> tuple[Manifest | None, list[str]]:
    def read() -> tuple[Manifest | None, list[str]]:
        try:
            return directory.read(iteration), []
        except CheckpointError as error:
            return None, [str(error)]

    def check_contents(manifest: Manifest) -> list[str]:
        try:
            read_train_state(directory.final_path(iteration), manifest)
            read_metadata(directory.final_path(iteration), manifest)
        except CheckpointError as error:
            return [str(error)]
        return []

    manifest, problems = run_on_rank_0(read)
    if manifest is None:
        return None, problems
    problems = gather_lists(directory.damages(manifest, share=dist.get_rank(), num_shares=dist.get_world_size()))
    return manifest, problems or run_on_rank_0(partial(check_contents, manifest))


def _check_config(cfg: ConfigContainer, directory: RunDirectory, manifest: Manifest, phase: str) -> None:
    comparison = compare_with_run(cfg, directory, manifest, phase)
    if comparison.refusals:
        raise CheckpointError(refusal_text(str(directory.path), manifest.iteration, comparison))
    if phase != saved_phase(directory.final_path(manifest.iteration), manifest):
        return  # the line about the phase says what changes
    for change in comparison.changes:
        logger.warning("the curve changes from iteration %d on: %s", manifest.iteration, change)
    saved = read_saved_config(directory.final_path(manifest.iteration) / CONFIG_NAME)
    if phase == BASE and (jump := rate_change(saved, cfg, manifest.consumed_samples)):
        logger.warning("%s", jump)
    if free := free_changes(saved, to_dict(cfg)):
        logger.info("changed since the checkpoint, without effect on the curve: %s", ", ".join(free))


def load_checkpoint(
    cfg: ConfigContainer,
    found: Found,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    dp_cp_group: ProcessGroup,
    new_layers: NewLayers,
    *,
    load_optim: bool,
) -> dict[str, Any]:
    """Fills model, optimizer and random state from a checkpoint, whatever layout saved it.

    Args:
        new_layers: starts MTP layers that the checkpoint lacks.
        load_optim: with optimizer state.

    Returns:
        The saved train state.

    Raises:
        UnreadableError: on every rank: a file cannot be read.
        CheckpointError: on every rank: it does not fit the model. In both cases weights may be partly loaded.
    """
    error: CheckpointError | None = None
    state: dict[str, Any] = {}
    try:
        state, scalars = read_train_state(found.path, found.manifest)
        _load(cfg, found, chunks, optimizer, dp_cp_group, new_layers, scalars, load_optim)
    except UnreadableError as failure:
        error = failure
    except MegatronMTPError as failure:
        error = CheckpointError(str(failure))
    except Exception as failure:
        logger.debug("loading failed", exc_info=failure)
        error = CheckpointError(f"{found.path}: cannot be loaded ({describe_error(failure)}).")
    raise_any(error)
    return state


def _load(
    cfg: ConfigContainer,
    found: Found,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    dp_cp_group: ProcessGroup,
    new_layers: NewLayers,
    scalars: dict[str, Any],
    load_optim: bool,
) -> None:
    saved = read_saved_config(found.path / CONFIG_NAME)
    same_place = found.manifest.world_size == dist.get_world_size() and _place(saved) == _place(to_dict(cfg))
    change = new_layers.change_from(saved)
    content = Content(chunks, optimizer if load_optim else None, dp_cp_group)
    plan = content.for_loading(with_random_state=same_place)
    loaded = read_plan(plan, found.path, change, load_optim)
    plan.adopt(loaded, scalars)
    added = new_layers.fill(change, found.path, scalars["step"] if load_optim else None)
    if not load_optim:
        optimizer.reload_model_params()
    else:
        set_master_weights(content.singles(), added)
        if saved["precision"]["dtype"] != cfg.precision.dtype:
            copy_master_weights_to_model(content.singles(), chunks)
    if same_place:
        restore_random_state(loaded[RNG_KEY])


def read_plan(plan: LoadPlan, folder: Place, change: DepthChange, load_optim: bool) -> dict[str, Any]:
    """The tensors that a plan asks for, after a comparison with all that are stored; new MTP layers are zeros.

    Raises:
        UnreadableError: on every rank: a file cannot be read.
        CheckpointError: the checkpoint and the model do not hold the same.
    """
    requested = {key for key in plan.requested_keys() if not change.is_new(key)}
    check_keys(folder, requested, load_optim, change.is_dropped)
    if not change.has_new:
        return read_shards(plan.state, folder)
    return read_without(plan.state, change.is_new, lambda state: read_shards(state, folder))


def read_shards(state: ShardedStateDict, folder: Place) -> dict[str, Any]:
    """`state` with tensors in place of shards.

    Raises:
        UnreadableError: on every rank: a file cannot be read on some rank, or torch refuses what is in it.
    """
    try:
        return load_shards(state, PlaceReader(folder))
    except (CheckpointException, OSError) as failure:  # torch's is not an Exception
        logger.debug("reading failed", exc_info=failure)
        raise UnreadableError(f"{folder}: cannot be read ({describe_error(failure)}).") from failure


def check_keys(path: Place, requested: set[str], load_optim: bool, is_dropped: Callable[[str], bool]) -> None:
    """Compares what all ranks request with what the checkpoint holds, both ways: nothing is skipped silently.

    Args:
        is_dropped: whether a stored key is left out on purpose.
    """
    wanted = set(gather_lists(sorted(requested))) - {RNG_KEY}
    stored = {key.split("/shard_")[0] for key in read_metadata(path).state_dict_metadata} - {RNG_KEY, COMMON_KEY}
    if not load_optim:
        stored = {key for key in stored if not key.startswith(OPTIMIZER_PREFIX)}
    elif not any(key.startswith(OPTIMIZER_PREFIX) for key in stored):
        raise CheckpointError(
            f"{path}: was saved without optimizer state (checkpoint.save_optim=false). Set checkpoint.load_optim=false."
        )
    if missing := wanted - stored:
        raise CheckpointError(f"{path}: lacks {_some(missing)}, which the model needs.")
    if surplus := {key for key in stored - wanted if not is_dropped(key)}:
        raise CheckpointError(f"{path}: holds {_some(surplus)}, which the model does not have.")


def _place(config: dict[str, Any]) -> list[Any]:
    return [config["model"][name] for name in _PLACE_FIELDS] + [config["dist"]["use_tp_pp_dp_mapping"]]


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
