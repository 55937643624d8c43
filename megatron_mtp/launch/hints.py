"""What is worth knowing before a job is submitted. Printed by `launch`, never an error."""

from __future__ import annotations

from megatron_mtp.config import hints
from megatron_mtp.launch.job import Job
from megatron_mtp.launch.view import View, path_hints


def job_hints(job: Job, kind: str, view: View) -> list[str]:
    """Advice on a job, one sentence or two each.

    Args:
        kind: local, slurm or k8s.
        view: what its processes see.
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
    if kind == "k8s" and ":" in (job.recipe or "") and not job.own_files:
        found.append(f"{job.recipe}: the image must hold the module.")
    return found
