"""A job for Slurm: one task per node checks the node, then runs torchrun's agent; requeued after a preemption."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template

from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.container import Container
from megatron_mtp.launch.environment import is_amd
from megatron_mtp.launch.job import PORT, Job, Place
from megatron_mtp.launch.view import View

NUM_PORTS = 1000
"""Range of ports: jobs that share a node must not share a port."""
LOGS_OF_NODE = '"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/$SLURMD_NODENAME"'

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
# shellcheck disable=SC2016  # the shells on the nodes expand the variables of their commands
set -u
$exports
first_node=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
export first_node
# This shell must survive the SIGTERM sent to its steps, in order to requeue.
trap : TERM

on_every_node() {
    srun --kill-on-bad-exit=0 ${start}bash -c "$$1"
}

code=0
$steps
if $is_preempted; then
    echo "preempted: requeued"
    scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job asks of Slurm, in addition to its nodes and GPUs.

    Args:
        partition: None: the cluster's default.
        account: None: the user's default.
        time: time limit in Slurm's format; None: the partition's.
        cpus_per_node: cores for the task of each node. Many clusters give a task only one by default.
        sbatch: other options of sbatch, such as `qos=high` or `exclusive`.
        srun: options of srun, such as `mpi=none`.
        container: None: the job runs on the node itself.
        secrets: variable -> file with its value, which the first node reads.
        after: number of the job that must end with 0 first.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus_per_node: int | None = None
    sbatch: Sequence[str] = ()
    srun: Sequence[str] = ()
    container: Container | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    after: str | None = None

    @property
    def view(self) -> View:
        """What the job sees of the file system."""
        return self.container.view if self.container else View()

    @property
    def options(self) -> dict[str, str | Sequence[str] | None]:
        """The texts as the user gave them, by option."""
        image, mounts = (self.container.image, self.container.mounts) if self.container else (None, None)
        found = {"--partition": self.partition, "--account": self.account, "--time": self.time, "--after": self.after}
        found |= {"--container-image": image, "--container-mounts": mounts}
        return {**found, "--sbatch": self.sbatch, "--srun": self.srun}


def render(job: Job, request: Request) -> str:
    """The batch script.

    Raises:
        ConfigError: the container does not see one of the user's files.
    """
    variables = dict(job.environment)
    options: dict[str, str | None] = {"partition": request.partition, "account": request.account, "time": request.time}
    if request.cpus_per_node:
        # srun ignores sbatch's option
        options["cpus-per-task"] = variables["SRUN_CPUS_PER_TASK"] = str(request.cpus_per_node)
    if job.has_gpus:
        options["gpus-per-node"] = str(job.gpus_per_node)
    if request.after:
        options |= {"dependency": f"afterok:{request.after}", "kill-on-invalid-dep": "yes"}
    given = [f"{name}={value}" for name, value in options.items() if value]
    exports, start = [*_exports(variables, request.secrets)], [f"--{text.lstrip('-')}" for text in request.srun]
    if container := request.container:
        names = [*variables, *request.secrets]
        exports += container.exports(names)
        start += container.srun_options(names) + container.command(has_gpus=job.has_gpus, is_amd=is_amd(job.cfg))
    return SCRIPT.substitute(
        name=job.name,
        nodes=job.nodes,
        grace=job.grace_s,
        code=job.cfg.dist.preempted_exit_code,
        is_preempted=" || ".join(f'[ "$code" -eq {code} ]' for code in job.requeued_codes),
        options="".join(f"#SBATCH --{option}\n" for option in [*given, *(text.lstrip("-") for text in request.sbatch)]),
        exports="\n".join(exports),
        start="".join(f"{shlex.quote(word)} " for word in start),
        steps="\n".join(_steps(job, request.view.place)),
    )


def _exports(variables: Mapping[str, str], secrets: Mapping[str, str]) -> Iterator[str]:
    for name, value in variables.items():
        yield f"export {name}={shlex.quote(value)}"
    for name, file in secrets.items():
        yield f"{name}=$(cat {shlex.quote(file)}) || exit {ConfigError.exit_code}"
        yield f"export {name}"


def _steps(job: Job, place: Place) -> Iterator[str]:
    """Shell lines that set `code`: the check of every node, then the ranks."""
    setup = f". {shlex.quote(place(job.setup))} || exit {ConfigError.exit_code}\n" if job.setup else ""
    rendezvous = job.rendezvous(
        job_id='"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        first_node='"$first_node"',
        is_first="$((SLURM_NODEID == 0))",
        port=f"$(({PORT} + SLURM_JOB_ID % {NUM_PORTS}))",
    )
    folder = job.log_folder
    agent = job.agent(rendezvous, place, f"{shlex.quote(folder)}/{LOGS_OF_NODE}" if folder else None)
    if preflight := job.preflight(place):
        yield f"on_every_node {shlex.quote(f'{setup}exec {preflight}')} || code=$?"
    yield 'if [ "$code" -eq 0 ]; then'
    yield f"    on_every_node {shlex.quote(f'{setup}exec {agent}')} || code=$?"
    yield "fi"
