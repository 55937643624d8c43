"""A job for Slurm: one task per node, which runs torchrun's agent; requeued after a preemption."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from string import Template

from megatron_mtp.launch.job import PORT, Job

NUM_PORTS = 1000
"""Range of ports: jobs that share a node must not share a port."""

SCRIPT = Template("""\
#!/bin/bash
# Made by `megatron-mtp launch slurm`.
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
# SIGTERM comes this long before the time limit; the job saves and exits with $code. On preemption the partition's
# GraceTime applies instead.
#SBATCH --signal=TERM@$grace
$options
set -u
$exports
first_node=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
export first_node
# This shell must survive the SIGTERM sent to its steps, in order to requeue.
trap : TERM

srun --kill-on-bad-exit=0 bash -c $agent
code=$$?
if $is_preempted; then
    echo "preempted: requeued"
    scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")


def render(
    job: Job,
    *,
    partition: str | None,
    account: str | None,
    time: str | None,
    cpus_per_node: int | None = None,
    more: Sequence[str] = (),
) -> str:
    """The batch script.

    Args:
        partition: None: the cluster's default.
        account: None: the user's default.
        time: time limit in Slurm's format; None: the partition's.
        cpus_per_node: cores for the task of each node. Many clusters give a task only one by default.
        more: other options of sbatch, such as `qos=high` or `exclusive`.
    """
    options: dict[str, str | None] = {"partition": partition, "account": account, "time": time}
    exports = dict(job.environment)
    if cpus_per_node:
        options["cpus-per-task"] = exports["SRUN_CPUS_PER_TASK"] = str(cpus_per_node)  # srun ignores sbatch's option
    if job.has_gpus:
        options["gpus-per-node"] = str(job.gpus_per_node)
    given = [f"{name}={value}" for name, value in options.items() if value]
    rendezvous = job.rendezvous(
        job_id='"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        first_node='"$first_node"',
        is_first="$((SLURM_NODEID == 0))",
        port=f"$(({PORT} + SLURM_JOB_ID % {NUM_PORTS}))",
    )
    return SCRIPT.substitute(
        name=job.name,
        nodes=job.nodes,
        grace=job.grace_s,
        code=job.cfg.dist.preempted_exit_code,
        is_preempted=" || ".join(f'[ "$code" -eq {code} ]' for code in job.requeued_codes),
        options="".join(f"#SBATCH --{option}\n" for option in [*given, *(text.lstrip("-") for text in more)]),
        exports="".join(f"export {name}={value}\n" for name, value in exports.items()),
        agent=shlex.quote(f"exec {job.agent(rendezvous)}"),
    )
