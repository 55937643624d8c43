"""A job of many processes as data, and what must hold before it is submitted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_mtp.checkpoint.preflight import is_same_directory
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, Problem

PORT = 29400
"""Port of the rendezvous on the first node."""
REAP_S = 15
"""Part of the grace time that is reserved for the launcher, after the ranks have ended."""
MIN_GRACE_S = 30
ENDED_BY_SIGTERM = 143
"""128 + 15, as shells report it."""

CONFIG_PATH = "/etc/megatron-mtp"
"""Where a pod finds the `--config` files."""
MOUNTED = ("/dev/shm", CONFIG_PATH)
"""Paths of a pod that hold something else than the shared file system."""
LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
# Option -> (form of its value, the form in words). None of them may hold a line break or another control character.
FORMS: dict[str, dict[str, tuple[str, str]]] = {
    "slurm": {
        "--partition": (r"\S+", "must be a name without spaces"),
        "--account": (r"\S+", "must be a name without spaces"),
        "--time": (r"\S+", "must be a time limit in Slurm's format, such as 24:00:00"),
        "--sbatch": (r"-{0,2}[A-Za-z]\S*.*", "must be one option of sbatch, such as qos=high or exclusive"),
    },
    "k8s": {
        "--image": (r"[A-Za-z0-9][\w.:/@+-]*", "must be the name of a container image, such as registry/image:tag"),
        "--namespace": (
            LABEL,
            "must be lower-case letters, digits and '-', at most 63, with no '-' at the beginning or end",
        ),
        "--claim": (
            rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*",
            "must be lower-case letters, digits, '-' and '.', at most 253, with a letter or digit at both ends",
        ),
        "--mount": (r"/[^:]*[^:/]", "must be an absolute path below /, without ':'"),
    },
}


@dataclass(frozen=True, slots=True)
class Job:
    """One training job.

    Args:
        cfg: finalized for its world size.
        recipe: name of the recipe.
        files: `--config` files, in order.
        overrides: section.field=value.
        name: name of the job.
        nodes: number of machines.
        gpus_per_node: processes on each node, each with a GPU unless dist.device is cpu.
        max_restarts: how often the ranks are restarted in place before the job fails.
    """

    cfg: ConfigContainer
    recipe: str
    files: list[Path]
    overrides: list[str]
    name: str
    nodes: int
    gpus_per_node: int
    max_restarts: int

    @property
    def grace_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return self.cfg.dist.preemption_grace_s

    @property
    def requeued_codes(self) -> list[int]:
        """Exit codes after which a job is requeued: left with a checkpoint, or SIGTERM before the first step.

        Not NotSavedError's: while the disk is full, the job would repeat the lost steps only to lose them again. A
        person must make room first.
        """
        return [self.cfg.dist.preempted_exit_code, ENDED_BY_SIGTERM]

    @property
    def has_gpus(self) -> bool:
        """Whether to request GPUs from the scheduler."""
        return self.cfg.dist.device != "cpu"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the agents."""
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_s - REAP_S)}

    def training(self, files: list[str] | None = None) -> list[str]:
        """The arguments that follow torchrun's own.

        Args:
            files: paths of the `--config` files on the node; None: the same as here.
        """
        places = files if files is not None else [str(file.absolute()) for file in self.files]
        configs = [argument for place in places for argument in ("--config", place)]
        return ["-m", "megatron_mtp", "pretrain", self.recipe, *configs, "--", *self.overrides]

    def agent(self, rendezvous: list[str], files: list[str] | None = None) -> str:
        """The shell command of one node. `rendezvous` is inserted unquoted: it may hold shell variables."""
        sizes = ["--nproc-per-node", str(self.gpus_per_node), "--max-restarts", str(self.max_restarts)]
        return " ".join(
            ["python", "-m", "megatron_mtp.launch.agent", *sizes, *rendezvous, shlex.join(self.training(files))]
        )

    def rendezvous(self, job_id: str, first_node: str, is_first: str, port: str = str(PORT)) -> list[str]:
        """torchrun's arguments for several nodes, as shell text."""
        return [
            f"--nnodes {self.nodes} --rdzv-backend c10d --rdzv-id {job_id} --rdzv-endpoint {first_node}:{port}",
            f"--rdzv-conf is_host={is_first},timeout=60,read_timeout=60,join_timeout=1800",
        ]


def job_problems(job: Job, kind: str) -> list[str]:
    """What would make the job fail or lose work, in addition to mistakes in the config."""
    ckpt, problems = job.cfg.checkpoint, []
    if ckpt.save is None or not is_same_directory(ckpt.save, ckpt.load):
        problems.append(
            f"checkpoint.save = {ckpt.save}, checkpoint.load = {ckpt.load}: a job that restarts automatically must "
            "resume from what it saved. Set both to the same directory on a file system that all nodes share."
        )
    elif not Path(ckpt.save).is_absolute() and kind != "local":
        problems.append(f"checkpoint.save = {ckpt.save}: must be absolute; nodes do not share a working directory.")
    if job.grace_s < MIN_GRACE_S:
        problems.append(
            f"dist.preemption_grace_s = {job.grace_s}: must be at least {MIN_GRACE_S}; {REAP_S} are for the launcher."
        )
    if kind == "local" and job.nodes != 1:
        problems.append(f"--nodes {job.nodes}: `launch local` starts processes on this machine only. Use --nodes 1.")
    if kind == "k8s" and not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", job.name):
        problems.append(
            f"--name {job.name}: Kubernetes requires a lower-case letter, then lower-case letters, digits and '-', "
            "at most 52 characters."
        )
    elif not re.fullmatch(r"[A-Za-z0-9._-]+", job.name):
        problems.append(f"--name {job.name}: use letters, digits, '.', '_' and '-' only.")
    return problems


def option_problems(kind: str, options: Mapping[str, str | Sequence[str] | None]) -> list[Problem]:
    """Options whose text the scheduler would refuse, or that would add lines to a script.

    Args:
        options: "--name" -> its value or values; None is not given.
    """
    problems = []
    for option, (form, rule) in FORMS.get(kind, {}).items():
        given = options.get(option)
        for text in [given] if isinstance(given, str) else given or ():
            if not text.isprintable():
                problems.append(Problem(fields=(option,), value=text, rule="must be one line of printable characters"))
            elif not re.fullmatch(form, text, re.ASCII):
                problems.append(Problem(fields=(option,), value=text, rule=rule))
            elif option == "--mount" and (rule := _mount_rule(PurePosixPath(text))):
                problems.append(Problem(fields=(option,), value=text, rule=rule, remedy="Use a path such as /shared."))
    return problems


def _mount_rule(path: PurePosixPath) -> str:
    """The rule that a mount path breaks, or nothing."""
    if ".." in path.parts:
        return "must not hold '..'"
    taken = [other for other in map(PurePosixPath, MOUNTED) if path.is_relative_to(other) or other.is_relative_to(path)]
    return f"would hide {taken[0]}, which the pod needs" if taken else ""


def check_job(job: Job, kind: str, options: Mapping[str, str | Sequence[str] | None]) -> None:
    """Raises ConfigError with every problem of a job and of the scheduler's options."""
    problems: Iterable[str | Problem] = [*job_problems(job, kind), *option_problems(kind, options)]
    if problems:
        raise ConfigError(problems)
