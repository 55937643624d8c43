"""A run directory: one folder for each checkpoint, which is there whole or not at all.

    iter_0000100/                       complete: its manifest lists every file; see `completion`
    latest_checkpointed_iteration.txt   for people and tools; never read here

It is a folder of this machine, or behind an address. Imports neither torch nor megatron.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

from megatron_mtp.checkpoint.completion import FOLDER, ByManifest, ByRename, Completion, folder_name
from megatron_mtp.checkpoint.manifest import (
    MANIFEST_NAME,
    SMALL_NAMES,
    Evaluation,
    Manifest,
    damage,
    damage_error,
    read_manifest,
)
from megatron_mtp.checkpoint.train_state import read_train_state
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, folders_in, place, replace_durably
from megatron_mtp.storage.remote_path import RemotePath

logger = logging.getLogger(__name__)

LATEST_NAME = "latest_checkpointed_iteration.txt"
LOCK_NAME = "run.lock"
"""Lock file of the process that trains in the directory."""


class RunDirectory:
    """Names, finds, completes and retires the checkpoints of one run."""

    def __init__(self, path: str | Place):
        self.path = place(path)
        self._completion: Completion = (
            ByManifest(self.path) if isinstance(self.path, RemotePath) else ByRename(self.path)
        )
        self.replaceable: set[int] = set()
        """Iterations whose folder `complete` may replace: damaged ones that the run has skipped, and its own that could
        not be completed."""
        self._removal: threading.Thread | None = None

    def final_path(self, iteration: int) -> Place:
        """Folder of a complete checkpoint."""
        return self.path / folder_name(iteration)

    def partial_path(self, iteration: int) -> Place:
        """Folder of a checkpoint that is being written."""
        return self._completion.begun_path(iteration)

    def iterations(self) -> list[int]:
        """Iterations of all checkpoint folders, newest first, damaged ones included.

        Raises:
            CheckpointError: the directory exists but cannot be listed.
        """
        try:
            return sorted(self._completion.iterations(), reverse=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed ({error.strerror}).") from error

    def read(self, iteration: int) -> Manifest:
        """The manifest of a checkpoint whose files are all there at their sizes.

        Raises:
            CheckpointError: it is not complete; names the file.
        """
        manifest = read_manifest(self.final_path(iteration))
        if manifest.iteration != iteration:
            path = self.final_path(iteration) / MANIFEST_NAME
            raise CheckpointError(f"{path}: belongs to iteration {manifest.iteration}.")
        return manifest

    def newest_listed(self, iterations: Sequence[int] | None = None) -> tuple[Manifest | None, list[str]]:
        """The newest checkpoint with all files at their sizes and intact small files, and the problems of newer ones.

        The checksums of large files are compared before they are read.

        Args:
            iterations: the ones to try, in this order; None: all, newest first.
        """
        problems: list[str] = []
        for iteration in self.iterations() if iterations is None else iterations:
            try:
                manifest = self.read(iteration)
                damaged = self.damages(manifest, only=SMALL_NAMES)
                if not damaged:
                    read_train_state(self.final_path(iteration), manifest)
                    return manifest, problems
                problems += damaged
            except CheckpointError as error:
                problems.append(str(error))
        return None, problems

    def complete_ones(self) -> list[Manifest]:
        """The manifests of all checkpoints with all files at their sizes, newest first."""
        found = []
        for iteration in self.iterations():
            with suppress(CheckpointError):
                found.append(self.read(iteration))
        return found

    def named(self, which: str) -> int:
        """The iteration that `RUN@which` means: a number, "latest", or "best" (`by_validation_loss`).

        Raises:
            CheckpointError: there is none.
        """
        iterations = self.iterations()
        if which == "best":
            complete = self.complete_ones()
            best = by_validation_loss(complete)
            if not best:
                metric = deciding_metric(complete)
                loss = "a validation loss" if metric is None else f"{metric!r} (checkpoint.best_metric)"
                raise CheckpointError(f"{self.path}@best: no checkpoint there was saved with {loss}.")
            return best[0].iteration
        wanted = iterations[:1] if which == "latest" else [int(which)]
        if not wanted or wanted[0] not in iterations:
            there = ", ".join(map(str, iterations[:20])) or "none"
            raise CheckpointError(f"{self.path}@{which}: there is no such checkpoint. Iterations there: {there}.")
        return wanted[0]

    def damages(
        self, manifest: Manifest, *, share: int = 0, num_shares: int = 1, only: Collection[str] | None = None
    ) -> list[str]:
        """Compares checksums of every num_shares-th file from `share` on; returns one problem for each damaged file."""
        directory = self.final_path(manifest.iteration)
        entries = [entry for entry in manifest.files if only is None or entry.name in only]
        found = (damage(directory, entry) for entry in entries[share::num_shares])
        return [problem for problem in found if problem]

    def begin(self, iteration: int) -> Place:
        """Makes an empty folder for the files of a checkpoint, and returns it.

        Raises:
            CheckpointError: there is a checkpoint of that iteration that this run does not know.
            OSError: no permission, no space, or the run directory is gone.
        """
        self.finish_removal()  # its disk space is needed
        self._completion.begin(iteration, may_replace=iteration in self.replaceable)
        return self.partial_path(iteration)

    def complete(self, manifest: Manifest) -> Place:
        """Writes the manifest; with it the checkpoint is complete, and durable. Returns its folder.

        An existing one of that iteration is replaced if it is `replaceable`.

        Raises:
            CheckpointError: there is a checkpoint of that iteration that this run does not know.
            OSError: the storage refused.
        """
        iteration = manifest.iteration
        is_known = iteration in self.replaceable
        try:
            self._completion.complete(iteration, manifest.to_bytes(), may_replace=is_known)
        except OSError:
            self.replaceable.add(iteration)  # it may be complete all the same
            raise
        self.replaceable.discard(iteration)
        self._write_latest(iteration)
        return self.final_path(iteration)

    def note_evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        """Writes the losses of an evaluation into the manifest of a complete checkpoint, at once or not at all.

        Raises:
            CheckpointError: the checkpoint is not complete, or the disk refuses.
        """
        manifest = self.read(iteration).with_evaluation(evaluation)
        folder = self.final_path(iteration)
        try:
            replace_durably(folder / MANIFEST_NAME, manifest.to_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the losses of the evaluation cannot be written into its manifest ({error.strerror})."
            ) from error

    def abandon(self, iteration: int) -> None:
        """Removes the folder of a checkpoint that was begun. Errors are ignored."""
        self._completion.abandon(iteration)

    def clear_remains(self) -> list[str]:
        """Removes what processes that died left over; only the holder of the lock may do so. Returns the names."""
        return sorted(self._completion.clear_remains())

    def retain(self, most_recent_k: int, keep_every: int | None = None, keep_best: int = 0) -> list[int]:
        """Removes complete checkpoints that no rule keeps, and returns their iterations.

        A thread deletes their files, which may be thousands on a slow file system, while training continues. Damaged
        folders do not count and stay: they are evidence, and they must not cause the newest complete checkpoint to be
        removed.

        Args:
            most_recent_k: the newest are kept, at least one; -1 keeps all.
            keep_every: iterations divisible by it are kept.
            keep_best: number of checkpoints with the lowest validation loss that are kept.
        """
        if most_recent_k < 0:
            return []
        found = self.complete_ones()
        kept = {manifest.iteration for manifest in found[: max(1, most_recent_k)]}
        if keep_every:
            kept |= {manifest.iteration for manifest in found if manifest.iteration % keep_every == 0}
        kept |= {manifest.iteration for manifest in by_validation_loss(found)[:keep_best]}
        surplus = [manifest.iteration for manifest in found if manifest.iteration not in kept]
        self.retire(surplus)
        return surplus

    def retire(self, iterations: Iterable[int]) -> None:
        """Removes checkpoints: at once they are none any more, and a thread deletes their files."""
        if retired := [self._completion.retire(iteration) for iteration in iterations]:
            self.finish_removal()
            self._removal = threading.Thread(target=_remove, args=(retired,), name="checkpoint-remover", daemon=True)
            self._removal.start()

    def finish_removal(self) -> None:
        """Waits until the files of retired checkpoints are deleted. The next start clears what a dead process left."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _write_latest(self, iteration: int) -> None:
        """Errors are ignored: nothing here reads the file, and the checkpoint is complete without it."""
        with suppress(OSError):
            replace_durably(self.path / LATEST_NAME, f"{iteration}\n".encode())


def _remove(removals: list[Callable[[], None]]) -> None:
    for remove in removals:
        remove()


def by_validation_loss(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Those that were saved with the loss that decides, the lowest first, of equal ones the older first."""
    found = list(manifests)
    metric = deciding_metric(found)
    losses = {manifest.iteration: manifest.evaluation.loss_by(metric) for manifest in found}
    known = {iteration: loss for iteration, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted((m for m in found if m.iteration in known), key=lambda m: (known[m.iteration], m.iteration))


def deciding_metric(manifests: Iterable[Manifest]) -> str | None:
    """checkpoint.best_metric of the newest of these; a resume may have changed it. None: the first set's main loss."""
    newest = max(manifests, key=lambda manifest: manifest.iteration, default=None)
    return None if newest is None else newest.best_metric


def split_name(name: str | Place) -> tuple[Place, str | None]:
    """`RUN@200`, `RUN@best`, `RUN@latest` and the folder `RUN/iter_0000200` as run directory and choice; any other path
    and None.

    >>> split_name("runs/mine@best")
    (PosixPath('runs/mine'), 'best')
    """
    path, (run, _, which) = place(name), str(name).rpartition("@")
    if run and re.fullmatch(r"[0-9]{1,18}|best|latest", which) and not path.exists():
        return path.with_name(path.name.removesuffix(f"@{which}")), which
    if (folder := FOLDER.fullmatch(path.name)) and path.is_dir() and not RunDirectory(path).iterations():
        return path.parent, str(int(folder[1]))
    return path, None


def resume_candidates(name: str | Place) -> tuple[RunDirectory, list[int]]:
    """The run directory of `RUN` or `RUN@which`, and the iterations that a resume may take, in the order to try them.

    Raises:
        CheckpointError: the one that is named is not there.
    """
    run, which = split_name(name)
    directory = RunDirectory(run)
    return directory, directory.iterations() if which is None else [directory.named(which)]


def newest_names(run: str | Place, count: int) -> list[str]:
    """The newest checkpoints of a run directory as `RUN@ITERATION`, the oldest of them first.

    Raises:
        CheckpointError: it holds fewer.
    """
    iterations = RunDirectory(run).iterations()[:count]
    if len(iterations) < count:
        there = ", ".join(map(str, reversed(iterations))) or "none"
        raise CheckpointError(f"{run}: holds fewer than {count} checkpoints. Iterations there: {there}.")
    return [f"{run}@{iteration}" for iteration in reversed(iterations)]


def why_empty(run: str | Place) -> str:
    """What to say of a run directory without checkpoints: a mistyped name is another mistake than an empty folder."""
    return "holds no checkpoint" if place(run).exists() else "there is no such directory, so it holds no checkpoint"


def checkpoint_folder(path: str | Place) -> Place:
    """The folder of one checkpoint: `path` itself, `RUN@which`, or the newest one in the run directory `path`.

    Only a resume takes an older one by itself: it goes on from there to the same end. Whoever reads weights gets the
    newest, or says which.

    Raises:
        CheckpointError: there is none, or the one that is meant is damaged.
    """
    path, which = split_name(path)
    if which is None and (path / MANIFEST_NAME).exists():
        return path
    directory = RunDirectory(path)
    iterations = directory.iterations()
    if not iterations:
        inside = next((folder for folder in folders_in(path) if RunDirectory(folder).iterations()), None)
        hint = "" if inside is None else f" Did you mean {inside}?"
        raise CheckpointError(f"{path}: {why_empty(path)}.{hint}")
    chosen = iterations[0] if which is None else directory.named(which)
    _, problems = directory.newest_listed([chosen])
    if problems:
        other, _ = directory.newest_listed()
        raise damage_error(
            directory.final_path(chosen), problems, None if other is None else directory.final_path(other.iteration)
        )
    return directory.final_path(chosen)
