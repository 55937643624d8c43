"""Saves and resumes a run: what the training loop calls."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mtp.checkpoint.content import COMMON_KEY, OPTIMIZER_PREFIX, Content, optimizer_scalars
from megatron_mtp.checkpoint.directory import RunDirectory, write_durably
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, TRAIN_STATE_NAME, Manifest, describe_file
from megatron_mtp.checkpoint.preflight import check_missing, compare_with_run, refusal_text, tokenizer_fingerprint
from megatron_mtp.checkpoint.random_state import RNG_KEY, restore_random_state
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.checkpoint.writer import (
    BackgroundWrite,
    RankFile,
    Written,
    agree,
    describe_error,
    plan_save,
    snapshot,
    write,
    write_metadata,
)
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_yaml
from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.errors import CheckpointError
from megatron_mtp.mcore_compat import copy_master_weights_to_model

log = logging.getLogger(__name__)

# A rank's random state belongs to its place; any of these moves the places.
_PLACE_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


class Resumable(Protocol):
    """The train state as this room sees it: training.state.TrainState."""

    iteration: int
    consumed_samples: int

    def to_dict(self) -> dict[str, Any]: ...
    def restore(self, values: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _Pending:
    """A checkpoint that is planned on all ranks and not yet whole."""

    manifest: Manifest
    train_state: dict[str, Any]
    file: RankFile
    started_s: float
    writing: BackgroundWrite | None = None


class Checkpointer:
    """The checkpoints of one run. Every method is a collective: all ranks call it at the same step.

    Args:
        cfg: finalized.
        groups: process groups of the layout.
        device: where collectives keep their tensors.
    """

    def __init__(self, cfg: ConfigContainer, groups: ProcessGroupCollection, device: torch.device | str = "cpu"):
        self.cfg, self.groups, self.device = cfg, groups, torch.device(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.directory = RunDirectory(cfg.checkpoint.save) if cfg.checkpoint.save else None
        self.last_stall_s = 0.0
        """Seconds for which the last save kept the training step waiting."""
        self.last_save_s = 0.0
        """Seconds from the start of the last save until the checkpoint was whole."""
        self.last_saved: int | None = None
        """Iteration of the newest checkpoint that this process saved, is saving, or resumed from."""
        self._pending: _Pending | None = None
        self._prepare_directory()

    def _prepare_directory(self) -> None:
        error = None
        if self.directory and self.rank == 0:
            try:
                self.directory.path.mkdir(parents=True, exist_ok=True)
                for name in self.directory.clear_remains():
                    log.info("removed %s, left behind by a save that did not finish", self.directory.path / name)
            except OSError as failure:
                error = f"checkpoint.save = {self.directory.path}: cannot be made ({describe_error(failure)})."
        _raise_agreed(error)

    # ---- saving ----

    def save(
        self, chunks: list[nn.Module], optimizer: MegatronOptimizer, train_state: Resumable, reason: str = "interval"
    ) -> None:
        """Saves everything. With checkpoint.async_save it returns when the state is copied, and `maybe_finalize` does the rest.

        Args:
            reason: why, for the manifest.

        Raises:
            CheckpointError: on every rank, with the first cause. The last whole checkpoint stays, no partial one is
                left, and training may go on.
        """
        if self.directory is None:
            return
        self._finish_previous()
        start = time.monotonic()
        pending = self._plan(chunks, optimizer, train_state, reason, start)
        partial = self.directory.partial_path(train_state.iteration)
        if self.cfg.checkpoint.async_save:
            content = self._content(chunks, optimizer)
            snapshot(pending.file, content.live_storages())
            pending.writing = BackgroundWrite(pending.file, partial, self.rank)
            self._pending = pending
            self.last_saved = train_state.iteration
            self.last_stall_s = time.monotonic() - start
            return
        written = write(pending.file, partial, self.rank)
        self._complete(pending, written)
        self.last_stall_s = self.last_save_s

    def maybe_finalize(self, blocking: bool = False) -> int | None:
        """Completes an asynchronous save whose files are written. Call it once a step; it costs nothing where none is under way.

        Args:
            blocking: wait for the files.

        Returns:
            The iteration of the checkpoint that became whole, or None.

        Raises:
            CheckpointError: on every rank; as `save`.
        """
        pending = self._pending
        if pending is None or pending.writing is None:
            return None
        if not blocking:
            is_done = torch.tensor(int(pending.writing.is_done), device=self.device)
            dist.all_reduce(is_done, op=dist.ReduceOp.MIN)
            if not is_done.item():
                return None
        self._pending = None
        self._complete(pending, pending.writing.result())
        return pending.manifest.iteration

    @property
    def is_saving(self) -> bool:
        """Whether an asynchronous save is under way."""
        return self._pending is not None

    def close(self) -> None:
        """Waits for a save that is under way; a failure is logged, for the run ends here."""
        self._finish_previous()

    def _finish_previous(self) -> None:
        try:
            self.maybe_finalize(blocking=True)
        except CheckpointError as error:
            if self.rank == 0:
                log.error("%s", error)

    def _content(self, chunks: list[nn.Module], optimizer: MegatronOptimizer | None) -> Content:
        return Content(chunks, optimizer if self.cfg.checkpoint.save_optim else None, self.groups.dp_cp)

    def _plan(
        self,
        chunks: list[nn.Module],
        optimizer: MegatronOptimizer,
        train_state: Resumable,
        reason: str,
        start: float,
    ) -> _Pending:
        iteration, error = train_state.iteration, None
        if self.rank == 0:
            try:
                self.directory.begin(iteration)
            except OSError as failure:
                self.directory.abandon(iteration)
                error = self._failure_text(iteration, f"{self.directory.path}: {describe_error(failure)}")
        _raise_agreed(error)
        content = self._content(chunks, optimizer)
        file = plan_save(content.for_saving(), self.directory.partial_path(iteration))
        manifest = Manifest(
            iteration=iteration,
            files=[],
            consumed_samples=train_state.consumed_samples,
            world_size=self.world_size,
            reason=reason,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tokenizer=tokenizer_fingerprint(self.cfg),
            versions=_versions(),
        )
        scalars = _first_known(optimizer_scalars(content))
        return _Pending(manifest, {"train": train_state.to_dict(), "optimizer": scalars}, file, start)

    def _complete(self, pending: _Pending, written: Written) -> None:
        """Rank 0 makes the checkpoint whole once every rank has written its file."""
        reports: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(written, reports, dst=0)
        error = None
        if self.rank == 0:
            try:
                self._make_whole(pending, reports)
            except (OSError, CheckpointError) as failure:
                self.directory.abandon(pending.manifest.iteration)
                error = self._failure_text(pending.manifest.iteration, describe_error(failure))
        self.last_saved = pending.manifest.iteration if error is None else None
        _raise_agreed(error)
        self.last_save_s = time.monotonic() - pending.started_s

    def _make_whole(self, pending: _Pending, reports: list[Written]) -> None:
        failures = [report.error for report in reports if report.error]
        if failures:
            raise CheckpointError("; ".join(failures))
        iteration = pending.manifest.iteration
        partial = self.directory.partial_path(iteration)
        write_durably(partial / CONFIG_NAME, to_yaml(self.cfg).encode())
        write_durably(partial / TRAIN_STATE_NAME, (json.dumps(pending.train_state, indent=1) + "\n").encode())
        files = [describe_file(partial / name) for name in (CONFIG_NAME, TRAIN_STATE_NAME)]
        files += write_metadata(partial, pending.file.metadata, reports)
        files += [report.entry for report in reports if report.entry]
        self.directory.complete(replace(pending.manifest, files=files))
        try:
            self.directory.retain(self.cfg.checkpoint.most_recent_k)
        except OSError as failure:
            log.warning("%s: an old checkpoint cannot be removed (%s)", self.directory.path, describe_error(failure))

    def _failure_text(self, iteration: int, cause: str) -> str:
        return (
            f"checkpoint.save = {self.directory.path}: the checkpoint of iteration {iteration} was not saved ({cause}). "
            "Earlier checkpoints are unharmed. Make room or mend the directory; the next save tries again."
        )

    # ---- resuming ----

    def resume(self, chunks: list[nn.Module], optimizer: MegatronOptimizer, train_state: Resumable) -> bool:
        """Takes everything from the newest whole checkpoint of checkpoint.load, whatever layout saved it.

        Checksums of all files are compared before any is parsed. A damaged checkpoint is named and the one before it
        taken.

        Returns:
            Whether there was one; False: a fresh start.

        Raises:
            CheckpointError: on every rank: there are checkpoints and none is whole, or the newest whole one belongs to
                a run with another config.
        """
        load = self.cfg.checkpoint.load
        if load is None:
            return False
        directory = RunDirectory(load)
        manifest = self._newest_whole(directory)
        if manifest is None:
            return False
        path = directory.whole_path(manifest.iteration)
        self._check_config(directory, manifest)
        error = None
        try:
            saved = json.loads((path / TRAIN_STATE_NAME).read_text())
            self._load(path, manifest, chunks, optimizer, saved["optimizer"])
            train_state.restore(saved["train"])
        except CheckpointError as failure:
            error = str(failure)
        except Exception as failure:
            log.debug("loading failed", exc_info=failure)
            error = f"{path}: cannot be loaded ({describe_error(failure)})."
        _raise_any(error)
        self.last_saved = manifest.iteration
        if self.rank == 0:
            log.info("resumed from %s", path)
        return True

    def _newest_whole(self, directory: RunDirectory) -> Manifest | None:
        """The newest checkpoint with every byte in place; None where a fresh start is allowed. Ranks share the reading."""
        iterations = _from_first(lambda: directory.iterations())
        damaged: list[str] = []
        for iteration in iterations:
            manifest, problems = _from_first(lambda iteration=iteration: _read_or_say(directory, iteration))
            if manifest is not None:
                problems = _joined(directory.damages(manifest, share=self.rank, num_shares=self.world_size))
            if not problems and manifest is not None:
                problems = _joined(self._look_through(directory, manifest))
            if not problems:
                return manifest
            if self.rank == 0:
                for problem in problems:
                    log.warning("checkpoint of iteration %d is damaged and skipped: %s", iteration, problem)
            damaged += problems
        error = None
        try:
            check_missing(self.cfg, damaged)
        except CheckpointError as failure:
            error = str(failure)
        _raise_agreed(error)
        return None

    def _look_through(self, directory: RunDirectory, manifest: Manifest) -> list[str]:
        """Rank 0 reads what is pickled, by an unpickler that knows harmless names only, before any rank loads it."""
        if self.rank != 0:
            return []
        try:
            read_metadata(directory.whole_path(manifest.iteration))
        except CheckpointError as error:
            return [str(error)]
        return []

    def _check_config(self, directory: RunDirectory, manifest: Manifest) -> None:
        error = None
        if self.rank == 0:
            try:
                comparison = compare_with_run(self.cfg, directory, manifest)
                if comparison.refusals:
                    error = refusal_text(str(directory.path), manifest.iteration, comparison)
                for change in comparison.changes:
                    log.warning("the curve changes from iteration %d on: %s", manifest.iteration, change)
            except CheckpointError as failure:
                error = str(failure)
        _raise_agreed(error)

    def _load(
        self,
        path: Path,
        manifest: Manifest,
        chunks: list[nn.Module],
        optimizer: MegatronOptimizer,
        scalars: dict[str, Any],
    ) -> None:
        saved = load_yaml((path / CONFIG_NAME).read_text(encoding="utf-8"), str(path / CONFIG_NAME))
        same_place = manifest.world_size == self.world_size and _place(saved) == _place_of(self.cfg)
        load_optim = self.cfg.checkpoint.load_optim
        content = Content(chunks, optimizer if load_optim else None, self.groups.dp_cp)
        plan = content.for_loading(with_random_state=same_place)
        self._check_keys(path, plan.requested_keys(), load_optim)
        loaded = dist_checkpointing.load(plan.state, str(path), validate_access_integrity=False)
        plan.adopt(loaded, scalars)
        if not load_optim:
            optimizer.reload_model_params()
        elif saved["precision"]["dtype"] != self.cfg.precision.dtype:
            copy_master_weights_to_model(content.singles(), chunks)
        if same_place:
            restore_random_state(loaded[RNG_KEY])

    def _check_keys(self, path: Path, requested: set[str], load_optim: bool) -> None:
        """Compares what all ranks want with what the checkpoint holds, both ways, so that nothing is left out silently."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, requested)
        wanted = set().union(*everyone) - {RNG_KEY}
        stored = {key.split("/shard_")[0] for key in read_metadata(path).state_dict_metadata} - {RNG_KEY, COMMON_KEY}
        has_optimizer = any(key.startswith(OPTIMIZER_PREFIX) for key in stored)
        if load_optim and not has_optimizer:
            raise CheckpointError(
                f"{path}: was saved without optimizer state (checkpoint.save_optim=false). Set checkpoint.load_optim=false."
            )
        if not load_optim:
            stored = {key for key in stored if not key.startswith(OPTIMIZER_PREFIX)}
        if missing := wanted - stored:
            raise CheckpointError(f"{path}: lacks {_some(missing)}, which the model needs.")
        if surplus := stored - wanted:
            raise CheckpointError(f"{path}: holds {_some(surplus)}, for which the model has no place.")


def _place(config: dict[str, Any]) -> list[Any]:
    model = config["model"]
    return [model[name] for name in _PLACE_FIELDS] + [config["dist"]["use_tp_pp_dp_mapping"]]


def _place_of(cfg: ConfigContainer) -> list[Any]:
    return [getattr(cfg.model, name) for name in _PLACE_FIELDS] + [cfg.dist.use_tp_pp_dp_mapping]


def _read_or_say(directory: RunDirectory, iteration: int) -> tuple[Manifest | None, list[str]]:
    try:
        return directory.read(iteration), []
    except CheckpointError as error:
        return None, [str(error)]


def _from_first(produce: Any) -> Any:
    """What rank 0 finds, on every rank; its CheckpointError too. A collective."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = produce()
        except CheckpointError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise CheckpointError(found[1])
    return found[0]


def _joined(problems: list[str]) -> list[str]:
    """The problems of all ranks, on every rank. A collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    return [problem for one in everyone for problem in one]


def _first_known(scalars: dict[str, Any]) -> dict[str, Any]:
    """Each value from the first rank that has it: a rank may hold no parameter. A collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, scalars)
    return {name: next((one[name] for one in everyone if one[name] is not None), None) for name in scalars}


def _raise_agreed(error: str | None) -> None:
    """Raises rank 0's error on every rank. A collective."""
    if agreed := agree(error):
        raise CheckpointError(agreed)


def _raise_any(error: str | None) -> None:
    """Raises the first error of any rank on every rank. A collective."""
    problems = _joined([] if error is None else [error])
    if problems:
        raise CheckpointError(problems[0])


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("megatron-mtp", "megatron-core", "torch", "transformer-engine"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
