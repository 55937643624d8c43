"""What the processes of a job see of the file system, and the paths of its config that they would miss there."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_mtp.config.paths import RunPath, run_paths
from megatron_mtp.errors import ConfigError, Problem
from megatron_mtp.launch.job import Job, same_path
from megatron_mtp.storage.address import is_address


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder or file of a container that lives outside it.

    Args:
        inside: its path in the container.
        outside: its path on the node, taken to be the same on this machine; None: this machine does not have it.
    """

    inside: str
    outside: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """The file system of a job.

    Args:
        mounts: of the container; None: no container, nodes share their file system with this machine.
        option: what makes another folder visible, for messages.
    """

    mounts: tuple[Mount, ...] | None = None
    option: str = ""

    def is_kept(self, path: str) -> bool:
        """Whether what the job writes at `path` outlives its processes."""
        return self.mounts is None or self._mount_of(path) is not None

    def here(self, path: str) -> str | None:
        """Where this machine has what the job sees at `path`; None: not known."""
        if self.mounts is None:
            return path
        mount = self._mount_of(path)
        if mount is None or mount.outside is None:
            return None
        return str(PurePosixPath(mount.outside) / PurePosixPath(posixpath.normpath(path)).relative_to(mount.inside))

    def place(self, file: Path) -> str:
        """The path at which the job sees a file of this machine.

        Raises:
            ConfigError: it does not.
        """
        path = same_path(file)
        if self.mounts is None:
            return path
        for mount in self.mounts:
            if mount.outside is not None and PurePosixPath(path).is_relative_to(mount.outside):
                return str(PurePosixPath(mount.inside) / PurePosixPath(path).relative_to(mount.outside))
        rule = f"the container does not see it. Mount its folder with {self.option}"
        raise ConfigError(Problem(fields=(path,), rule=rule))

    def _mount_of(self, path: str) -> Mount | None:
        """The innermost mount that holds `path`."""
        place = PurePosixPath(posixpath.normpath(path))  # without '..', which would lead out of a mount
        holding = [mount for mount in self.mounts or () if place.is_relative_to(mount.inside)]
        return max(holding, key=lambda mount: len(mount.inside), default=None)


def path_problems(job: Job, view: View) -> list[Problem]:
    """Paths that mean something else on the nodes, and what would be lost with a container."""
    problems = []
    paths = {path.path: path for path in reversed(_paths(job))}  # one field of several that name it
    for path in reversed(paths.values()):
        if not PurePosixPath(path.path).is_absolute():
            rule = "must be absolute; nodes do not share a working directory"
            problems.append(Problem(fields=(path.field,), value=path.path, rule=rule))
        elif path.is_written and not path.is_scratch and not view.is_kept(path.path):
            rule = "is on the container's own disk and would be lost with it"
            remedy = f"Mount a shared file system there with {view.option}, or name a folder on one."
            problems.append(Problem(fields=(path.field,), value=path.path, rule=rule, remedy=remedy))
    return problems


def file_problems(job: Job, view: View) -> list[Problem]:
    """The user's files that a container does not see, where the job reads them from the file system of the nodes."""
    problems = []
    for file in job.own_files:
        try:
            view.place(file)
        except ConfigError as error:
            problems += error.problems
    return problems


def path_hints(job: Job, view: View) -> Iterator[str]:
    """Paths of which this machine cannot say that the job finds them."""
    for path in _paths(job):
        if path.is_written:
            continue
        here = view.here(path.path)
        if here is not None:
            for missing in path.missing(here)[:1]:
                yield f"{path.field} = {path.path}: this machine sees no {missing}. The nodes must."
        elif not view.is_kept(path.path):
            yield f"{path.field} = {path.path}: is on no mounted file system, so the image must hold it."
        else:
            yield f"{path.field} = {path.path}: this machine cannot see whether it is there."


def _paths(job: Job) -> list[RunPath]:
    """The paths of a job; its script's are known to the script alone."""
    found = [] if job.script is not None else [path for path in run_paths(job.cfg) if not is_address(path.path)]
    # Without --logs they lie beside checkpoint.save, as do the metrics.
    return [*found, RunPath("--logs", job.log_folder, is_written=True)] if job.log_folder else found
