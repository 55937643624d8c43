"""`megatron-mtp launch local|slurm|k8s`: starts a job of many processes, here or under a scheduler."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_mtp.cli.choose import Callbacks, Files
from megatron_mtp.cli.launch_job import check, hint, make_job, start_here, submit, submit_chain
from megatron_mtp.cli.launch_options import (
    DryRun,
    Env,
    GpusPerNode,
    Logs,
    MaxRestarts,
    Name,
    Nodes,
    NoGpus,
    Recipe,
    Script,
    Setup,
    Words,
)
from megatron_mtp.errors import ConfigError

launch = typer.Typer(
    no_args_is_help=True,
    help="Start a job that recovers by itself: failed ranks restart in place, a preempted job is requeued by the "
    "scheduler. The config is validated for the job's size before anything is submitted.",
)


@launch.command()
def local(
    recipe: Recipe = None,
    words: Words = None,
    config: Files = None,
    callback: Callbacks = None,
    script: Script = None,
    gpus_per_node: GpusPerNode = 8,
    max_restarts: MaxRestarts = 3,
    env: Env = None,
    logs: Logs = None,
    dry_run: DryRun = False,
) -> None:
    """Start a job on this machine."""
    from megatron_mtp.launch.environment import read_variables
    from megatron_mtp.launch.view import View

    job = make_job(
        (recipe, words, config, script),
        callbacks=callback,
        gpus_per_node=gpus_per_node,
        max_restarts=max_restarts,
        variables=read_variables(env or [], os.environ),
        logs=logs,
        python=sys.executable,
    )
    check(job, "local", {})
    hint(job, "local", View())
    start_here(job, dry_run)


@launch.command()
def slurm(
    recipe: Recipe = None,
    words: Words = None,
    config: Files = None,
    callback: Callbacks = None,
    script: Script = None,
    cpu: NoGpus = False,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    max_restarts: MaxRestarts = 3,
    name: Name = None,
    partition: Annotated[str | None, typer.Option(help="Partition to submit to.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 24:00:00.")] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Cores per node. Many clusters give a task only one by default.")
    ] = None,
    env: Env = None,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Variable that the job reads from a file. Repeatable.")
    ] = None,
    setup: Setup = None,
    logs: Logs = None,
    container_image: Annotated[str | None, typer.Option(metavar="IMAGE", help="Run in this container.")] = None,
    container_mounts: Annotated[
        str | None, typer.Option(metavar="SRC:DST,...", help="What the container sees of the nodes' file systems.")
    ] = None,
    container_runtime: Annotated[
        Literal["pyxis", "apptainer"], typer.Option(help="What starts the container; pyxis is part of srun.")
    ] = "pyxis",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Any option of sbatch, such as qos=high or exclusive. Repeatable.")
    ] = None,
    srun: Annotated[list[str] | None, typer.Option(help="Any option of srun, such as mpi=none. Repeatable.")] = None,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="Start when this job has ended with 0.")] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="Submit this many jobs; each continues the run when the one before ended with 0.")
    ] = 1,
    dry_run: DryRun = False,
) -> None:
    """Start a job under Slurm. It is requeued after a preemption and before its time limit."""
    from megatron_mtp.launch import environment
    from megatron_mtp.launch.container import Container
    from megatron_mtp.launch.slurm import Request

    if container_mounts and not container_image:
        raise ConfigError("--container-mounts: works only with --container-image. Add it, or leave the mounts out.")
    request = Request(
        partition=partition,
        account=account,
        time=time,
        cpus_per_node=cpus_per_node,
        sbatch=sbatch or [],
        srun=srun or [],
        container=Container(container_image, container_mounts, container_runtime) if container_image else None,
        secrets=environment.read_secrets(secret or [], "slurm"),
        after=after,
    )
    job = make_job(
        (recipe, words, config, script),
        callbacks=callback,
        is_cpu=cpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        max_restarts=max_restarts,
        name=name,
        variables=environment.read_variables(env or [], os.environ, environment.SECRET_FORMS["slurm"][1]),
        setup=setup,
        logs=logs,
        # A setup file or a container brings its own Python; otherwise the nodes have this one under the same path.
        python="python" if setup or container_image else sys.executable,
    )
    check(job, "slurm", request.options, request.view)
    hint(job, "slurm", request.view, request.secrets)
    submit_chain(job, request, chain, dry_run)


@launch.command()
def k8s(
    image: Annotated[str, typer.Option(help="Container image with megatron-mtp.")],
    recipe: Recipe = None,
    words: Words = None,
    config: Files = None,
    callback: Callbacks = None,
    script: Script = None,
    cpu: NoGpus = False,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    max_restarts: MaxRestarts = 3,
    name: Name = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of the job.")] = None,
    claim: Annotated[str | None, typer.Option(help="PersistentVolumeClaim of the shared file system.")] = None,
    mount: Annotated[str, typer.Option(help="Mount path of the claim.")] = "/shared",
    env: Env = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SECRET/KEY", help="Variable with the value of a Secret's key. Repeatable."),
    ] = None,
    setup: Setup = None,
    logs: Logs = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AMOUNT", help="What each pod gets besides GPUs: cpu=96, memory=900Gi, rdma/hca=8. Repeatable."
        ),
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label that a node must have. Repeatable.")
    ] = None,
    pull_secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Secret that the image's registry needs. Repeatable.")
    ] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="YAML that is merged into the Job, for anything else. Repeatable."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Start a job under Kubernetes."""
    from megatron_mtp.launch import environment, k8s
    from megatron_mtp.launch.k8s_patch import read_patch

    request = k8s.Request(
        image=image,
        namespace=namespace,
        claim=claim,
        mount=mount,
        secrets=environment.read_secrets(secret or [], "k8s"),
        resources=resource or [],
        node_selector=node_selector or [],
        pull_secrets=pull_secret or [],
        patches=[read_patch(file) for file in patch or []],
    )
    job = make_job(
        (recipe, words, config, script),
        callbacks=callback,
        is_cpu=cpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        max_restarts=max_restarts,
        name=name,
        variables=environment.read_variables(env or [], os.environ, environment.SECRET_FORMS["k8s"][1]),
        setup=setup,
        logs=logs,
    )
    view = k8s.view([k8s.job_manifest(job, request)])
    check(job, "k8s", request.options, view)
    hint(job, "k8s", view)
    typer.echo(submit(k8s.as_text(k8s.manifests(job, request)), ["kubectl", "apply", "-f", "-"], dry_run), nl=False)
