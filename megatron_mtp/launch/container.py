"""Containers under Slurm: Pyxis, which is part of srun there, and Apptainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_mtp.launch.view import Mount, View


@dataclass(frozen=True, slots=True)
class Container:
    """The container of a Slurm job.

    Args:
        image: as the runtime names it: a registry's name, or a file (.sqsh, .sif).
        mounts: SRC:DST pairs with commas between them.
        runtime: what starts it.
    """

    image: str
    mounts: str | None = None
    runtime: Literal["pyxis", "apptainer"] = "pyxis"

    @property
    def view(self) -> View:
        """What processes in it see. Both runtimes take SRC alone for SRC:SRC."""
        found = []
        for entry in self.mounts.split(",") if self.mounts else ():
            source, _, rest = entry.partition(":")
            found.append(Mount(inside=rest.partition(":")[0] or source, outside=source))
        return View(tuple(found), option="--container-mounts")

    def srun_options(self, variables: Iterable[str]) -> list[str]:
        """Options of srun.

        Args:
            variables: names that keep the job's value where the image sets another.
        """
        if self.runtime != "pyxis":
            return []
        options = [f"--container-image={self.image}", f"--container-env={','.join(variables)}"]
        return [*options, *([f"--container-mounts={self.mounts}"] if self.mounts else [])]

    def command(self, *, has_gpus: bool, is_amd: bool) -> list[str]:
        """The words that start a command in it."""
        if self.runtime != "apptainer":
            return []
        gpus = ["--rocm" if is_amd else "--nv"] if has_gpus else []
        return ["apptainer", "exec", *gpus, *(["--bind", self.mounts] if self.mounts else []), self.image]

    def exports(self, variables: Iterable[str]) -> list[str]:
        """Lines of the batch script: Apptainer lets an image override variables that have no such twin."""
        if self.runtime != "apptainer":
            return []
        return [f'export APPTAINERENV_{name}="${name}"' for name in variables]
