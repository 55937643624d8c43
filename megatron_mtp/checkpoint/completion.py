"""How a checkpoint becomes complete, at once: on files by a rename, on object storage by its manifest, written last.

    iter_0000100/             complete: its manifest lists every file
    iter_0000200.partial/     files: being written, or left over from a process that died
    iter_0000300/begun        objects, without a manifest: the same

Object storage has no rename. There a folder with the mark `begun` and without a manifest is no checkpoint. One without
both has lost its manifest: it is damaged, as on files, and never taken for remains. Imports neither torch nor megatron.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_mtp.checkpoint.manifest import MANIFEST_NAME
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, sync_directory, write_durably
from megatron_mtp.storage.remote_path import RemotePath, all_at_once

logger = logging.getLogger(__name__)

BEGUN_NAME = "begun"
FOLDER = re.compile(r"iter_(\d{7,})")
_REMAINS = re.compile(r"iter_\d{7,}\.(partial|replaced|retired)")


def folder_name(iteration: int) -> str:
    """Name of the folder of a complete checkpoint."""
    return f"iter_{iteration:07d}"


class Completion(Protocol):
    """What a run directory must know of its storage."""

    def iterations(self) -> list[int]:
        """Iterations of all checkpoints, in any order, damaged ones included.

        Raises:
            OSError: the directory exists but cannot be listed.
        """

    def begun_path(self, iteration: int) -> Place:
        """Where the files of a checkpoint are written."""

    def begin(self, iteration: int, *, may_replace: bool) -> None:
        """Makes an empty folder for the files of a checkpoint.

        Raises:
            OSError: no permission, no space, or the run directory is gone.
            CheckpointError: as `complete`.
        """

    def complete(self, iteration: int, manifest: bytes, *, may_replace: bool) -> None:
        """Writes the manifest beside the files; then the checkpoint is complete, and durable.

        Raises:
            CheckpointError: there is a checkpoint of that iteration, and it may not be replaced.
            OSError: the storage refused.
        """

    def abandon(self, iteration: int) -> None:
        """Removes the folder of a checkpoint that was begun. Errors are ignored."""

    def retire(self, iteration: int) -> Callable[[], None]:
        """From now on it is no checkpoint. Returns what removes its files."""

    def clear_remains(self) -> list[str]:
        """Removes what processes that died have left over. Returns the names."""


@dataclass(frozen=True, slots=True)
class ByRename:
    """On files.

    Args:
        path: the run directory.
    """

    path: Path

    def iterations(self) -> list[int]:
        """See `Completion`."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [int(match[1]) for match in map(FOLDER.fullmatch, names) if match]

    def begun_path(self, iteration: int) -> Path:
        """See `Completion`."""
        return self.path / f"{folder_name(iteration)}.partial"

    def begin(self, iteration: int, *, may_replace: bool) -> None:
        """See `Completion`. A run directory that vanished is not made again: a checkpoint on the wrong disk is worse
        than none. One that is to be replaced stays until `complete`."""
        partial = self.begun_path(iteration)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()

    def complete(self, iteration: int, manifest: bytes, *, may_replace: bool) -> None:
        """See `Completion`."""
        partial, final = self.begun_path(iteration), self.path / folder_name(iteration)
        if final.exists() and not may_replace:
            raise _exists_error(final)
        write_durably(partial / MANIFEST_NAME, manifest)
        sync_directory(partial)
        replaced = self.path / f"{final.name}.replaced"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            logger.warning("%s: the damaged checkpoint of this name is replaced", final)
        partial.rename(final)
        sync_directory(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def abandon(self, iteration: int) -> None:
        """See `Completion`."""
        shutil.rmtree(self.begun_path(iteration), ignore_errors=True)

    def retire(self, iteration: int) -> Callable[[], None]:
        """See `Completion`: one that is half removed must not be taken for damaged."""
        retired = self.path / f"{folder_name(iteration)}.retired"
        (self.path / folder_name(iteration)).rename(retired)
        return lambda: shutil.rmtree(retired, ignore_errors=True)

    def clear_remains(self) -> list[str]:
        """See `Completion`."""
        try:
            names = [name for name in os.listdir(self.path) if _REMAINS.fullmatch(name)]
        except OSError:
            return []
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)
        return names


@dataclass(frozen=True, slots=True)
class ByManifest:
    """On object storage.

    Args:
        path: the run directory.
    """

    path: RemotePath

    def iterations(self) -> list[int]:
        """See `Completion`."""
        return [iteration for iteration, state in self._folders().items() if state == "counts"]

    def begun_path(self, iteration: int) -> RemotePath:
        """See `Completion`."""
        return self.path / folder_name(iteration)

    def begin(self, iteration: int, *, may_replace: bool) -> None:
        """See `Completion`. One that is to be replaced is removed here."""
        folder = self.begun_path(iteration)
        if not may_replace and _state(folder) == "counts":
            raise _exists_error(folder)
        _make_begun(folder)
        folder.remove_tree(but=BEGUN_NAME)

    def complete(self, iteration: int, manifest: bytes, *, may_replace: bool) -> None:
        """See `Completion`."""
        folder = self.begun_path(iteration)
        write_durably(folder / MANIFEST_NAME, manifest)
        with suppress(OSError):  # beside a manifest it means nothing
            (folder / BEGUN_NAME).unlink()

    def abandon(self, iteration: int) -> None:
        """See `Completion`."""
        folder = self.begun_path(iteration)
        with suppress(OSError):
            _make_begun(folder)
            _remove_begun(folder)

    def retire(self, iteration: int) -> Callable[[], None]:
        """See `Completion`."""
        folder = self.begun_path(iteration)
        _make_begun(folder)
        return lambda: _remove_begun(folder)

    def clear_remains(self) -> list[str]:
        """See `Completion`."""
        try:
            found = [self.begun_path(iteration) for iteration, state in self._folders().items() if state == "begun"]
        except OSError:
            return []
        for folder in found:
            _remove_begun(folder)
        return [folder.name for folder in found]

    def _folders(self) -> dict[int, _State]:
        """The state of each folder of a checkpoint."""
        try:
            names = self.path.entries()
        except FileNotFoundError:
            return {}
        found = [int(match[1]) for match in map(FOLDER.fullmatch, names) if match]
        states = all_at_once(lambda iteration: _state(self.begun_path(iteration)), found)
        return dict(zip(found, states, strict=True))


_State = Literal["counts", "begun", "gone"]
"""State of a checkpoint's folder. counts: it holds a checkpoint, whole or damaged. begun: its save has not ended, or it
is being removed. gone: nothing is in it."""


def _state(folder: RemotePath) -> _State:
    if (folder / MANIFEST_NAME).is_file():
        return "counts"
    if (folder / BEGUN_NAME).is_file():
        return "begun"
    # It may have been completed, or removed, since the first look.
    return "counts" if (folder / MANIFEST_NAME).is_file() or folder.exists() else "gone"


def _make_begun(folder: RemotePath) -> None:
    """From now on the folder holds no checkpoint, wherever this process dies."""
    write_durably(folder / BEGUN_NAME, b"")
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def _remove_begun(folder: RemotePath) -> None:
    """Removes the folder, the mark last. Errors are ignored: the next start clears what is left."""
    with suppress(OSError):
        folder.remove_tree(but=BEGUN_NAME)
        (folder / BEGUN_NAME).unlink()


def _exists_error(folder: Place) -> CheckpointError:
    return CheckpointError(f"{folder}: exists already, and this run did not write it")
