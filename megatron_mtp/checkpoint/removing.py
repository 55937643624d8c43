"""Removes checkpoints by name, under the lock of their run directory."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mtp.checkpoint.directory import LOCK_NAME, RunDirectory, split_name
from megatron_mtp.data.lock import Lock
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place


def remove(names: Sequence[str | Place], *, force: bool = False) -> list[Place]:
    """Removes checkpoints, all or, after an error, none.

    Args:
        names: `RUN@200`, `RUN@best` and the like.
        force: also where no complete checkpoint of the run is left.

    Returns:
        The folders.

    Raises:
        CheckpointError: a name means no checkpoint, or nothing complete would be left.
        InUseError: a process trains in the directory.
    """
    chosen: dict[Place, set[int]] = {}
    for name in names:
        run, which = split_name(name)
        if which is None:
            raise CheckpointError(f"{name}: name an iteration of it, as {name}@200; `checkpoint list` shows them.")
        chosen.setdefault(run, set()).add(RunDirectory(run).named(which))
    removed: list[Place] = []
    for run, iterations in chosen.items():
        _require_rest(RunDirectory(run), iterations, force=force)
    for run, iterations in chosen.items():
        lock = Lock(run / LOCK_NAME, str(run))
        for _ in lock.take(0.0):
            pass
        try:
            directory = RunDirectory(run)
            directory.retire(sorted(iterations))
            directory.finish_removal()
            removed += map(directory.final_path, sorted(iterations))
        finally:
            lock.release()
    return removed


def _require_rest(directory: RunDirectory, iterations: set[int], *, force: bool) -> None:
    complete = {manifest.iteration for manifest in directory.complete_ones()}
    if complete and complete <= iterations and not force:
        raise CheckpointError(
            f"{directory.path}: no complete checkpoint would be left. To remove them all the same, add --force."
        )
