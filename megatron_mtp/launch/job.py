"""A job of many processes as data: what each node runs, and what must hold before it is submitted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mtp.checkpoint.preflight import BRANCH, is_same_directory
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.blend import is_mock
from megatron_mtp.config.overrides import as_override
from megatron_mtp.errors import Problem
from megatron_mtp.launch.environment import default_environment
from megatron_mtp.recipes.own import absolute, recipe_file
from megatron_mtp.storage.address import is_address

PORT = 29400
"""Port of the rendezvous on the first node."""
REAP_S = 15
"""Part of the grace time that is reserved for the launcher, after the ranks have ended."""
MIN_GRACE_S = 30
ENDED_BY_SIGTERM = 143
"""128 + 15, as shells report it."""

type Place = Callable[[Path], str]
"""The path under which the nodes find a file that was named here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training job.

    Args:
        cfg: finalized for its world size; of a script, the defaults.
        recipe: name of the recipe; None: `script` is run.
        script: training script that calls `megatron_mtp.main`.
        arguments: section.field=value, or the arguments of the script.
        files: `--config` files, in order.
        name: name of the job.
        nodes: number of machines.
        gpus_per_node: processes on each node, each with a GPU unless dist.device is cpu.
        max_restarts: how often the ranks are restarted in place before the job fails.
        variables: environment variables that the user sets.
        setup: shell file that each node reads first.
        logs: folder of the output of every rank; None: next to the run's metrics, if they have a place.
        python: interpreter on the nodes.
        problems: what is wrong with `cfg`, which is not finalized then; such a job is refused.
    """

    cfg: ConfigContainer
    recipe: str | None = None
    script: Path | None = None
    arguments: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    name: str
    nodes: int
    gpus_per_node: int
    max_restarts: int = 3
    variables: dict[str, str] = field(default_factory=dict)
    setup: Path | None = None
    logs: str | None = None
    python: str = "python"
    problems: list[Problem] = field(default_factory=list)

    @property
    def grace_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return self.cfg.dist.preemption_grace_s

    @property
    def requeued_codes(self) -> list[int]:
        """Exit codes after which a job is requeued: left with a checkpoint, or SIGTERM before the first step.

        Not NotSavedError's: while the disk is full, the job would repeat the lost steps only to lose them again. A
        person must make room first. Not NodeError's: it would be given the same node again.
        """
        return [self.cfg.dist.preempted_exit_code, ENDED_BY_SIGTERM]

    @property
    def has_gpus(self) -> bool:
        """Whether to request GPUs from the scheduler."""
        return self.cfg.dist.device != "cpu"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the agents; the user's win."""
        timeout = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_s - REAP_S)}
        return timeout | default_environment(self.cfg) | self.variables

    @property
    def own_files(self) -> list[Path]:
        """Files of the user that the nodes read."""
        names = [self.recipe or "", *self.callbacks]
        found = (self.setup, self.script, *map(recipe_file, names), *self.files)
        return list(dict.fromkeys(file for file in found if file is not None))

    @property
    def python_files(self) -> list[Path]:
        """Those of `own_files` that are Python: script, recipe and callbacks."""
        return [file for file in self.own_files if file == self.script or file.suffix == ".py"]

    @property
    def callbacks(self) -> list[str]:
        """The names in train.callbacks, files by their absolute paths."""
        return [absolute(name) for name in self.cfg.train.callbacks]

    @property
    def log_folder(self) -> str | None:
        """Where the output of every rank goes; None: into the output of the job."""
        if self.logs or self.cfg.logger.log_dir:
            return self.logs or f"{self.cfg.logger.log_dir}/ranks"
        save = self.cfg.checkpoint.save
        return None if save is None or is_address(save) else f"{save.rstrip('/')}.logs"

    def training(self, place: Place) -> list[str]:
        """The arguments that follow torchrun's own."""
        if self.script is not None:
            return [place(self.script), *self.arguments]
        return ["-m", "megatron_mtp", "pretrain", *self._config(place)]

    def _config(self, place: Place) -> list[str]:
        def placed(name: str) -> str:
            file = recipe_file(name)
            return name if file is None else f"{place(file)}:{name.rpartition(':')[2]}"

        configs = [argument for file in self.files for argument in ("--config", place(file))]
        callbacks = [placed(name) for name in self.callbacks]
        own = [as_override("train.callbacks", callbacks)] if callbacks else []
        return [placed(self.recipe or ""), *configs, "--", *self.arguments, *own]

    def agent(self, rendezvous: list[str], place: Place, logs: str | None = None) -> str:
        """The shell command that starts the ranks of a node.

        Args:
            rendezvous: torchrun's arguments, as shell text: they may hold shell variables.
            logs: folder of this node's output, as shell text; None: no files.
        """
        sizes = ["--nproc-per-node", str(self.gpus_per_node), "--max-restarts", str(self.max_restarts)]
        # Every rank writes files; the first one of each node also speaks in the output of the job.
        files = f"--log-dir {logs} --redirects 3 --tee 0:3 --log-line-prefix-template '[rank ${{rank}}] '"
        begin = [shlex.quote(self.python), "-m", "megatron_mtp.launch.agent", *sizes, *rendezvous]
        return " ".join([*begin, *([files] if logs else []), shlex.join(self.training(place))])

    def preflight(self, place: Place) -> str | None:
        """The shell command that checks a node before ranks start on it; None: dist.node_check is off."""
        if not self.cfg.dist.node_check:
            return None
        words = [self.python, "-m", "megatron_mtp", "doctor", "--node"]
        words += ["--gpus", str(self.gpus_per_node)] if self.has_gpus else []
        return shlex.join(words if self.script else [*words, *self._config(place)])

    def rendezvous(self, job_id: str, first_node: str, is_first: str, port: str = str(PORT)) -> list[str]:
        """torchrun's arguments for several nodes, as shell text."""
        return [
            f"--nnodes {self.nodes} --rdzv-backend c10d --rdzv-id {job_id} --rdzv-endpoint {first_node}:{port}",
            f"--rdzv-conf is_host={is_first},timeout=60,read_timeout=60,join_timeout=1800",
        ]


def same_path(file: Path) -> str:
    """The place of a file on nodes that share their file system with this machine."""
    return str(file.absolute())


def job_problems(job: Job, kind: str) -> list[str | Problem]:
    """What would make the job fail or lose work, mistakes in the config included."""
    ckpt, problems = job.cfg.checkpoint, list[str | Problem](job.problems)
    if job.script is None and (ckpt.save is None or not is_same_directory(ckpt.save, ckpt.load)):
        branch = "" if ckpt.load is None else f" {BRANCH}"
        problems.append(
            f"checkpoint.save = {ckpt.save}, checkpoint.load = {ckpt.load}: a job that restarts automatically must "
            f"resume from what it saved. Set both to the same directory on a file system that all nodes share.{branch}"
        )
    if job.script is None and kind != "local" and is_mock(job.cfg.dataset) and not job.cfg.dataset.mock:
        rule = "is not set, so the job would train on random tokens"
        remedy = "Name the data, or ask for random tokens with dataset.mock=true."
        problems.append(Problem(fields=("dataset.blend",), rule=rule, remedy=remedy))
    if job.grace_s < MIN_GRACE_S:
        problems.append(
            f"dist.preemption_grace_s = {job.grace_s}: must be at least {MIN_GRACE_S}; {REAP_S} are for the launcher."
        )
    for file in job.own_files:
        if not file.is_file():
            problems.append(f"{file}: there is no such file.")
    if kind == "k8s" and not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", job.name):
        problems.append(
            f"--name {job.name}: Kubernetes requires a lower-case letter, then lower-case letters, digits and '-', "
            "at most 52 characters."
        )
    elif not re.fullmatch(r"[A-Za-z0-9._-]+", job.name):
        problems.append(f"--name {job.name}: use letters, digits, '.', '_' and '-' only.")
    return problems
