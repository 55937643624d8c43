"""A run directory: one folder for each checkpoint, written under another name and renamed when it is complete.

    iter_0000100/                       complete: its manifest lists every file
    iter_0000200.partial/               being written, or left over from a process that died
    latest_checkpointed_iteration.txt   for people and tools; never read here

Imports neither torch nor megatron.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

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
from megatron_mtp.storage.address import ADDRESS_RULE, is_address

logger = logging.getLogger(__name__)

LATEST_NAME = "latest_checkpointed_iteration.txt"
LOCK_NAME = "run.lock"
"""Lock file of the process that trains in the directory."""
_COMPLETE = re.compile(r"iter_(\d{7,})")
_REMAINS = re.compile(r"iter_\d{7,}\.(partial|replaced|retired)")


class RunDirectory:
    """Names, finds, completes and retires the checkpoints of one run."""

    def __init__(self, path: str | Path):
        if is_address(path):
            raise CheckpointError(f"{path}: {ADDRESS_RULE}.")
        self.path = Path(path)
        self.replaceable: set[int] = set()
        """Iterations whose folder `complete` may replace: damaged ones that the run has skipped, and its own that could
        not be completed."""
        self._removal: threading.Thread | None = None

    def final_path(self, iteration: int) -> Path:
        """Folder of a complete checkpoint."""
        return self.path / f"iter_{iteration:07d}"

    def partial_path(self, iteration: int) -> Path:
        """Folder of a checkpoint that is being written."""
        return self.path / f"iter_{iteration:07d}.partial"

    def iterations(self) -> list[int]:
        """Iterations of all checkpoint folders, newest first, damaged ones included.

        Raises:
            CheckpointError: the directory exists but cannot be listed.
        """
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed ({error.strerror}).") from error
        found = (_COMPLETE.fullmatch(name) for name in names)
        return sorted((int(match[1]) for match in found if match), reverse=True)

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

    def begin(self, iteration: int) -> Path:
        """Makes an empty partial folder.

        The run directory must exist. One that vanished is not created again: a checkpoint on the wrong disk is worse
        than none.

        Raises:
            OSError: no permission, no space, or the run directory is gone.
        """
        self.finish_removal()  # its disk space is needed
        partial = self.partial_path(iteration)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        return partial

    def complete(self, manifest: Manifest) -> Path:
        """Writes the manifest into the partial folder, makes all of it durable, and renames it to its final name.

        An existing folder of that name is replaced if its iteration is `replaceable`.

        Raises:
            CheckpointError: there is a folder of that name that this run does not know.
            OSError: the disk refused.
        """
        partial, final = self.partial_path(manifest.iteration), self.final_path(manifest.iteration)
        write_durably(partial / MANIFEST_NAME, manifest.to_bytes())
        _sync_directory(partial)
        replaced = self.path / f"{final.name}.replaced"
        if final.exists():
            if manifest.iteration not in self.replaceable:
                raise CheckpointError(f"{final}: exists already, and this run did not write it")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            logger.warning("%s: the damaged checkpoint of this name is replaced", final)
        self.replaceable.add(manifest.iteration)  # until its name is durable
        partial.rename(final)
        _sync_directory(self.path)
        self.replaceable.discard(manifest.iteration)
        shutil.rmtree(replaced, ignore_errors=True)
        self._write_latest(manifest.iteration)
        return final

    def note_evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        """Writes the losses of an evaluation into the manifest of a complete checkpoint, at once or not at all.

        Raises:
            CheckpointError: the checkpoint is not complete, or the disk refuses.
        """
        manifest = self.read(iteration).with_evaluation(evaluation)
        folder = self.final_path(iteration)
        new = folder / f".{MANIFEST_NAME}.new"
        try:
            new.unlink(missing_ok=True)
            write_durably(new, manifest.to_bytes())
            new.rename(folder / MANIFEST_NAME)
            _sync_directory(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the losses of the evaluation cannot be written into its manifest ({error.strerror})."
            ) from error

    def abandon(self, iteration: int) -> None:
        """Removes a partial folder. Errors are ignored."""
        shutil.rmtree(self.partial_path(iteration), ignore_errors=True)

    def clear_remains(self) -> list[str]:
        """Removes what processes that died left over; only the holder of the lock may do so. Returns the names."""
        try:
            names = sorted(name for name in os.listdir(self.path) if _REMAINS.fullmatch(name))
        except OSError:
            return []
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)
        return names

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
        """Removes checkpoints: they are renamed at once, so that one that is half removed is not taken for damaged."""
        retired = []
        for iteration in iterations:
            retired.append(self.path / f"iter_{iteration:07d}.retired")
            self.final_path(iteration).rename(retired[-1])
        if retired:
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
        target = self.path / LATEST_NAME
        temporary = self.path / f".{LATEST_NAME}.new"
        try:
            temporary.unlink(missing_ok=True)
            write_durably(temporary, f"{iteration}\n".encode())
            temporary.rename(target)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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


def split_name(name: str | Path) -> tuple[Path, str | None]:
    """`RUN@200`, `RUN@best`, `RUN@latest` and the folder `RUN/iter_0000200` as run directory and choice; any other path
    and None.

    >>> split_name("runs/mine@best")
    (PosixPath('runs/mine'), 'best')
    """
    path, (run, _, which) = Path(name), str(name).rpartition("@")
    if run and re.fullmatch(r"[0-9]{1,18}|best|latest", which) and not path.exists():
        return Path(run), which
    if (folder := _COMPLETE.fullmatch(path.name)) and path.is_dir() and not RunDirectory(path).iterations():
        return path.parent, str(int(folder[1]))
    return path, None


def resume_candidates(name: str | Path) -> tuple[RunDirectory, list[int]]:
    """The run directory of `RUN` or `RUN@which`, and the iterations that a resume may take, in the order to try them.

    Raises:
        CheckpointError: the one that is named is not there.
    """
    run, which = split_name(name)
    directory = RunDirectory(run)
    return directory, directory.iterations() if which is None else [directory.named(which)]


def newest_names(run: str | Path, count: int) -> list[str]:
    """The newest checkpoints of a run directory as `RUN@ITERATION`, the oldest of them first.

    Raises:
        CheckpointError: it holds fewer.
    """
    iterations = RunDirectory(run).iterations()[:count]
    if len(iterations) < count:
        there = ", ".join(map(str, reversed(iterations))) or "none"
        raise CheckpointError(f"{run}: holds fewer than {count} checkpoints. Iterations there: {there}.")
    return [f"{run}@{iteration}" for iteration in reversed(iterations)]


def why_empty(run: str | Path) -> str:
    """What to say of a run directory without checkpoints: a mistyped name is another mistake than an empty folder."""
    return "holds no checkpoint" if os.path.exists(run) else "there is no such directory, so it holds no checkpoint"


def checkpoint_folder(path: str | Path) -> Path:
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
        inside = next((folder for folder in sorted(path.glob("*/")) if RunDirectory(folder).iterations()), None)
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


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk. An existing link of that name is not followed.

    Raises:
        FileExistsError: there is a file of that name.
    """
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. File systems that cannot do it answer EINVAL, which is no error."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
