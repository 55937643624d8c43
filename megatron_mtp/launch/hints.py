"""What is worth knowing before a job is submitted. Printed by `launch`, never an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_mtp.config import hints
from megatron_mtp.launch.job import Job
from megatron_mtp.launch.k8s import imported_files
from megatron_mtp.launch.view import View, path_hints
from megatron_mtp.recipes.own import recipe_file

OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm")


def job_hints(job: Job, kind: str, view: View, secrets: Mapping[str, str]) -> list[str]:
    """Advice on a job, one sentence or two each.

    Args:
        kind: local, slurm or k8s.
        view: what its processes see.
        secrets: variable -> file that the first node reads, or key of a Secret.
    """
    if kind == "local":
        return [] if job.script else hints.hints(job.cfg)
    found = [*([] if job.script else hints.hints(job.cfg)), *path_hints(job, view)]
    if job.script is not None:
        dist = job.cfg.dist
        found.append(
            f"{job.script}: its config is checked when it runs. The job expects dist.preempted_exit_code = "
            f"{dist.preempted_exit_code} and dist.preemption_grace_s = {dist.preemption_grace_s}."
        )
    if job.log_folder is None:
        found.append("All ranks write into the output of the job; --logs DIR gives each rank files of its own.")
    if job.has_gpus and job.cfg.dist.hardware is None and job.script is None:
        found.append("dist.hardware is not set: the planner assumes h100, and no variable of a device is set.")
    if job.cfg.train.exit_duration_in_mins is not None or job.cfg.train.exit_interval is not None:
        end = "a job that ends with 0 is not requeued; submit several with --chain"
        if kind == "k8s":
            end = "Kubernetes counts a run that stops early as complete"
        found.append(f"train.exit_duration_in_mins or exit_interval ends the run early with exit code 0: {end}.")
    return [*found, *(_pod_hints(job) if kind == "k8s" else _file_hints(job, secrets))]


def _pod_hints(job: Job) -> Iterator[str]:
    """What travels with a job by itself, and what does not."""
    for name in [job.recipe or "", *job.callbacks]:
        if ":" in name and recipe_file(name) is None:
            yield f"{name}: the image must hold the module."
    if imported := list(imported_files(job)):
        yield f"{', '.join(imported)}: imported by the files of the job from beside them, and passed on with them."


def _file_hints(job: Job, secrets: Mapping[str, str]) -> Iterator[str]:
    """Files of which this machine cannot say that the nodes find them."""
    for file in job.own_files:
        if any(file.absolute().is_relative_to(folder) for folder in OF_ONE_MACHINE):
            yield f"{file}: lies in a folder that machines seldom share. The nodes must see it."
    for name, secret in secrets.items():
        if not Path(secret).is_file():
            yield f"--secret {name}: this machine sees no {secret}. The nodes must."
