"""Saves and resumes a run: what the training loop calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mtp.checkpoint.agreement import describe_error, first_value_of_any_rank, run_on_rank_0
from megatron_mtp.checkpoint.content import Content, optimizer_scalars
from megatron_mtp.checkpoint.directory import LOCK_NAME, RunDirectory, checkpoint_folder
from megatron_mtp.checkpoint.kept_files import KEPT_FOLDER, keep_with_run
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, Evaluation, Manifest
from megatron_mtp.checkpoint.new_layers import NewLayers
from megatron_mtp.checkpoint.preflight import (
    check_unused,
    is_same_directory,
    read_saved_config,
    tokenizer_fingerprint,
)
from megatron_mtp.checkpoint.pretrained import load_model_weights
from megatron_mtp.checkpoint.resuming import Found, load_newest
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.checkpoint.writer import (
    BackgroundWrite,
    RankFile,
    Written,
    plan_save,
    snapshot,
    write,
    write_shared_files,
)
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.phases import BASE
from megatron_mtp.data.lock import Lock
from megatron_mtp.data.sources import data_fingerprints
from megatron_mtp.errors import CheckpointError
from megatron_mtp.mcore.kept_buffers import KeptBuffers
from megatron_mtp.mcore.optimizer import gather_weights
from megatron_mtp.observe.env import package_versions
from megatron_mtp.storage.place import Place

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """A checkpoint that is planned on all ranks and not yet complete."""

    manifest: Manifest
    train_state: dict[str, Any]
    file: RankFile
    started_s: float
    writing: BackgroundWrite | None = None


class Checkpointer:
    """The checkpoints of one run. Every method is a collective: all ranks call it at the same step.

    It holds the lock of checkpoint.save from the start until `release`. It waits checkpoint.lock_wait_s for a run that
    trains there, and dist.preemption_grace_s for one that is about to end: so long that one may take.

    Args:
        cfg: finalized.
        groups: process groups of the layout; empty ones, where `enter` follows before anything is read or saved.
        device: where collectives keep their tensors.

    Raises:
        InUseError: on every rank: another run trains in checkpoint.save.
        CheckpointError: on every rank: checkpoint.save cannot be made, or holds a run that is not to be continued.
    """

    def __init__(self, cfg: ConfigContainer, groups: ProcessGroupCollection, device: torch.device | str = "cpu"):
        self.cfg, self.groups, self.device = cfg, groups, torch.device(device)
        self.phase = BASE
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.directory = RunDirectory(cfg.checkpoint.save) if cfg.checkpoint.save else None
        self.last_saved: int | None = None
        """Iteration of the newest checkpoint that this process saved, is saving, or resumed from."""
        self.last_complete: int | None = None
        """Iteration of the newest complete checkpoint that this process saved or resumed from."""
        self.resumed_config: dict[str, dict[str, Any]] | None = None
        """Config in the checkpoint that was loaded last; None: there was none."""
        self.last_stall_s = 0.0
        """Seconds for which the last save kept the training step waiting."""
        self.last_save_s = 0.0
        """Seconds from the start of the last save until the checkpoint was complete."""
        self._pending: _Pending | None = None
        self._buffers = KeptBuffers() if cfg.checkpoint.async_save else None
        is_writer = self.directory is not None and self.rank == 0
        self._is_writer = is_writer
        self._tokenizer = tokenizer_fingerprint(cfg) if is_writer else None
        self._data = list(data_fingerprints(cfg).values()) if is_writer else []
        self._lock: Lock | None = None  # on rank 0
        self._new_layers: NewLayers | None = None
        if self.directory:
            steps = self._open_directory()
            while run_on_rank_0(lambda: next(steps, True)) is None:  # short rounds: no rank waits long in a collective
                pass

    @property
    def _run_directory(self) -> RunDirectory:
        assert self.directory is not None, "checkpoint.save is not set: nothing is saved"
        return self.directory

    def _open_directory(self) -> Iterator[None]:
        """Makes the directory and takes its lock, on rank 0. Yields while it waits."""
        path = self._run_directory.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path / LOCK_NAME, f"checkpoint.save = {path}")
            for _ in self._lock.take(self.cfg.checkpoint.lock_wait_s, self.cfg.dist.preemption_grace_s):
                yield
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.save = {path}: cannot be made or written ({describe_error(error)})."
            ) from error
        try:
            check_unused(self.cfg)  # another run may have saved there since the check before the start
            if not (path / KEPT_FOLDER).is_dir() or not self._run_directory.iterations():
                self._keep_files(path)
        except BaseException:  # whatever it was, this process does not train here
            self._lock.release()
            raise
        for name in self._run_directory.clear_remains():
            logger.info("removed %s, the remains of a save that did not finish", path / name)

    def enter(self, cfg: ConfigContainer, groups: ProcessGroupCollection, phase: str) -> None:
        """From now on checkpoints are of this phase, with its config and layout; no save may be under way."""
        assert self._pending is None, "a save is under way"
        self.cfg, self.groups, self.phase = cfg, groups, phase
        self._new_layers = None  # they are of the chunks that are built next
        self._buffers = KeptBuffers() if cfg.checkpoint.async_save else None  # the shards have other shapes
        self._data = list(data_fingerprints(cfg).values()) if self._is_writer else []

    # ---- resuming ----

    def resume(self, chunks: list[nn.Module], optimizer: MegatronOptimizer, train_state: TrainState) -> bool:
        """Restores everything from the newest complete checkpoint of checkpoint.load, whatever layout saved it.

        Returns:
            Whether there was one; False: a fresh start.

        Raises:
            CheckpointError: on every rank: there are checkpoints and none is complete, the newest complete one belongs
                to a run with another config, or it cannot be loaded.
        """
        load = self.cfg.checkpoint.load
        if load is None:
            return False
        load_optim = self.cfg.checkpoint.load_optim
        loaded = self._load_newest(load, chunks, optimizer, load_optim=load_optim)
        if loaded is None:
            return False
        found, saved = loaded
        self.resumed_config = read_saved_config(found.path / CONFIG_NAME)
        self._restore(train_state, saved)
        self.last_complete = found.manifest.iteration
        if is_same_directory(self.cfg.checkpoint.save, str(found.path.parent)):
            self._went_to(found.manifest.iteration)
        if self.rank == 0:
            logger.info("resumed from %s", found.path)
        return True

    def roll_back(self, chunks: list[nn.Module], optimizer: MegatronOptimizer, train_state: TrainState) -> None:
        """Restores everything from the newest complete checkpoint of checkpoint.save, within the run.

        Raises:
            CheckpointError: on every rank: there is no complete one.
        """
        path = self.load_own(chunks, optimizer, train_state)
        if self.rank == 0:
            logger.info("went back to %s", path)

    def load_own(self, chunks: list[nn.Module], optimizer: MegatronOptimizer, train_state: TrainState) -> Place:
        """Restores everything from the newest complete checkpoint of checkpoint.save and returns its folder.

        Raises:
            CheckpointError: on every rank: there is no complete one.
        """
        path = self._run_directory.path
        loaded = self._load_newest(path, chunks, optimizer, load_optim=True)
        if loaded is None:
            raise CheckpointError(f"checkpoint.save = {path}: holds no checkpoint to go on from.")
        found, saved = loaded
        self.resumed_config = read_saved_config(found.path / CONFIG_NAME)
        self._restore(train_state, saved)
        self._went_to(found.manifest.iteration)
        return found.path

    def _load_newest(
        self, path: str | Place, chunks: list[nn.Module], optimizer: MegatronOptimizer, *, load_optim: bool
    ) -> tuple[Found, dict[str, Any]] | None:
        layers = self._keep_new_layers(chunks)
        groups, phase = self.groups.dp_cp, self.phase
        return load_newest(self.cfg, path, chunks, optimizer, groups, layers, load_optim=load_optim, phase=phase)

    def _keep_new_layers(self, chunks: list[nn.Module]) -> NewLayers:
        """Made at the first load, before anything changes the chunks."""
        if self._new_layers is None:
            self._new_layers = NewLayers(self.cfg, chunks)
        return self._new_layers

    def _restore(self, train_state: TrainState, saved: dict[str, Any]) -> None:
        train_state.restore(saved)
        train_state.keep_depths(self.cfg.model.mtp_num_layers)

    def _went_to(self, iteration: int) -> None:
        """The run continues from this checkpoint in checkpoint.save; newer ones are damaged."""
        self.last_saved = self.last_complete = iteration
        self._run_directory.replaceable |= {n for n in run_on_rank_0(self._run_directory.iterations) if n > iteration}

    def _keep_files(self, path: Place) -> None:
        try:
            keep_with_run(self.cfg, path)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.save = {path}: the tokenizer cannot be copied there ({describe_error(error)})."
            ) from error

    def start_from_pretrained(self, chunks: list[nn.Module], optimizer: MegatronOptimizer) -> None:
        """Loads the weights of checkpoint.pretrained_checkpoint, if it is set, whatever layout saved them.

        Raises:
            CheckpointError: on every rank: it is damaged, or not of this model.
        """
        pretrained = self.cfg.checkpoint.pretrained_checkpoint
        if pretrained is None:
            return
        folder = run_on_rank_0(lambda: checkpoint_folder(pretrained))
        load_model_weights(folder, chunks, self.groups.dp_cp, self._keep_new_layers(chunks))
        optimizer.reload_model_params()
        if self.rank == 0:
            logger.info("started from the weights of %s", folder)

    # ---- saving ----

    def save(
        self,
        chunks: list[nn.Module],
        optimizer: MegatronOptimizer,
        train_state: TrainState,
        reason: str = "interval",
        evaluation: Evaluation | None = None,
    ) -> None:
        """Saves everything. With checkpoint.async_save it returns when the state is copied; `maybe_finalize` finishes.

        Args:
            reason: why, for the manifest.
            evaluation: at this iteration, for the rule that keeps the best; None: there was none.

        Raises:
            CheckpointError: on every rank, with the first cause. Earlier checkpoints stay, no partial one is left, and
                training can continue.
            InUseError: on every rank: another run has taken over the directory; this one must end.
        """
        if self.directory is None:
            return
        self.close()  # one at a time
        started_s = time.monotonic()
        gather_weights(chunks)
        run_on_rank_0(lambda: self._begin(train_state.iteration))
        partial = self._run_directory.partial_path(train_state.iteration)
        content = Content(chunks, optimizer if self.cfg.checkpoint.save_optim else None, self.groups.dp_cp)
        if self._buffers is not None:
            self._buffers.start()  # the save before is complete
            content.save_in(self._buffers)
        file = plan_save(content.for_saving())
        # `for_saving` initialized the optimizer state; before that there is no step count.
        scalars = first_value_of_any_rank(optimizer_scalars(content))
        pending = _Pending(
            self._manifest(train_state, reason, evaluation or Evaluation()),
            {"train": train_state.to_dict(), "optimizer": scalars},
            file,
            started_s,
        )
        self.last_saved = train_state.iteration
        if self._buffers is not None:
            snapshot(pending.file, content.live_storages(), self._buffers)
            pending.writing = BackgroundWrite(pending.file, partial, self.rank)
            self._pending = pending
        else:
            self._complete(pending, write(pending.file, partial, self.rank))
        self.last_stall_s = time.monotonic() - started_s

    def maybe_finalize(self, blocking: bool = False) -> int | None:
        """Completes an asynchronous save whose files are written. Call it once a step; without a save it does nothing.

        Args:
            blocking: wait for the files.

        Returns:
            The iteration of the checkpoint that was completed, or None.

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

    def note_evaluation(self, evaluation: Evaluation) -> None:
        """Adds the losses to the last checkpoint, which was saved before the evaluation at its iteration was over.

        Raises:
            CheckpointError: on every rank: the manifest cannot be written. The checkpoint stays as it is.
        """
        if (pending := self._pending) is not None:
            pending.manifest = pending.manifest.with_evaluation(evaluation)
        elif self.directory is not None and (iteration := self.last_saved) is not None:
            run_on_rank_0(lambda: self._run_directory.note_evaluation(iteration, evaluation))

    def close(self) -> None:
        """Waits for a save that is under way. Its failure is logged, since no caller can handle it.

        Retired checkpoints are removed completely.
        """
        try:
            self.maybe_finalize(blocking=True)
        except CheckpointError as error:
            if self.rank == 0:
                logger.error("%s", error)
        if self.directory:
            self.directory.finish_removal()

    def announce_end(self) -> None:
        """Tells a start that waits for the directory that this run is about to end."""
        if self._lock is not None:
            self._lock.announce_end()

    def release(self) -> None:
        """Gives the lock of checkpoint.save back. Not a collective; nothing may be saved afterwards."""
        if self._lock is not None:
            self._lock.release()

    @property
    def _held_lock(self) -> Lock:
        assert self._lock is not None, "rank 0 holds the lock"
        return self._lock

    def _begin(self, iteration: int) -> None:
        try:
            self._held_lock.check()
            self._run_directory.begin(iteration)
        except OSError as error:
            raise self._failure(iteration, f"{self._run_directory.path}: {describe_error(error)}") from error

    def _manifest(self, train_state: TrainState, reason: str, evaluation: Evaluation) -> Manifest:
        return Manifest(
            iteration=train_state.iteration,
            files=[],
            consumed_samples=train_state.consumed_samples,
            world_size=self.world_size,
            reason=reason,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            validation_loss=evaluation.main_loss,
            validation_losses=evaluation.losses,
            best_metric=self.cfg.checkpoint.best_metric,
            tokenizer=self._tokenizer,
            data=self._data,
            versions=package_versions(),
        )

    def _complete(self, pending: _Pending, written: Written) -> None:
        """Rank 0 completes the checkpoint once every rank has written its file."""
        reports: list[Any] = [None] * self.world_size
        dist.gather_object(written, reports if self.rank == 0 else None, dst=0)
        try:
            run_on_rank_0(lambda: self._finish(pending, reports))
        except CheckpointError:
            self.last_saved = None
            raise
        self.last_complete = pending.manifest.iteration
        self.last_save_s = time.monotonic() - pending.started_s
        place = self._run_directory.final_path(pending.manifest.iteration)
        logger.info("saved %s (%s) in %.1f s", place, pending.manifest.reason, self.last_save_s)

    def _finish(self, pending: _Pending, reports: list[Written]) -> None:
        iteration = pending.manifest.iteration
        try:
            failures = [report.error for report in reports if report.error]
            if failures:
                raise CheckpointError("; ".join(failures))
            partial = self._run_directory.partial_path(iteration)
            files = write_shared_files(partial, self.cfg, pending.train_state, pending.file.metadata, reports)
            self._held_lock.check()
            self._run_directory.complete(replace(pending.manifest, files=files))
        except (OSError, CheckpointError) as error:
            self._run_directory.abandon(iteration)
            raise self._failure(iteration, describe_error(error)) from error
        try:
            rules = self.cfg.checkpoint
            self._run_directory.retain(rules.most_recent_k, rules.keep_every, rules.keep_best)
        except OSError as error:
            logger.warning(
                "%s: an old checkpoint cannot be removed (%s)", self._run_directory.path, describe_error(error)
            )

    def _failure(self, iteration: int, cause: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint.save = {self._run_directory.path}: iteration {iteration} was not saved ({cause}). "
            "Earlier checkpoints are intact. Free disk space or repair the directory; the next save tries again."
        )
