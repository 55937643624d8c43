"""`megatron-mtp launch`: starts a job of many processes, here or under a scheduler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from typing import Annotated, Literal

import typer

from megatron_mtp.cli.choose import Callbacks, Files, Overrides, Recipe, check_named_callbacks, choose_config
from megatron_mtp.errors import ConfigError, Problem


def launch(
    where: Annotated[
        Literal["local", "slurm", "k8s"], typer.Argument(help="Where to run: on this machine, Slurm or Kubernetes.")
    ],
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    callback: Callbacks = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Processes per machine, one per GPU.")] = 8,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often failed ranks restart in place before the job fails.")
    ] = 3,
    name: Annotated[str | None, typer.Option(help="Name of the job. Default: the recipe's name.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition to submit to.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account to charge.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit, such as 24:00:00.")] = None,
    cpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Slurm: cores per node. Many clusters give a task only one by default."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Slurm: any other option of sbatch, such as qos=high or exclusive; repeatable."),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: container image with megatron-mtp (required).")] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes: namespace of the job.")] = None,
    claim: Annotated[
        str | None, typer.Option(help="Kubernetes: PersistentVolumeClaim of the shared file system.")
    ] = None,
    mount: Annotated[str, typer.Option(help="Kubernetes: mount path of the claim.")] = "/shared",
) -> None:
    """Start a job that recovers by itself: failed ranks restart in place, a preempted job is requeued by the scheduler.

    The config is validated for the job's size before anything is submitted.
    """
    from megatron_mtp.config.overrides import as_override
    from megatron_mtp.launch.job import Job, check_job
    from megatron_mtp.recipes.own import absolute

    cfg = choose_config(recipe, config, overrides, callback)
    cfg.finalize(nodes * gpus_per_node)
    check_named_callbacks(cfg)
    if cfg.train.callbacks:
        if where == "k8s" and (files := [name for name in cfg.train.callbacks if absolute(name) != name]):
            rule = "is a file of this machine, which pods do not have"
            remedy = "Put it into the image and name it as module:Class, or by its absolute path there."
            raise ConfigError(Problem(fields=("train.callbacks",), value=files[0], rule=rule, remedy=remedy))
        own = as_override("train.callbacks", [absolute(name) for name in cfg.train.callbacks])
        overrides = [*(overrides or []), own]
    chosen = name or recipe.rpartition(":")[2].replace("_", "-")
    job = Job(cfg, absolute(recipe), config or [], overrides or [], chosen, nodes, gpus_per_node, max_restarts)
    options = {"--partition": partition, "--account": account, "--time": time, "--sbatch": sbatch}
    options |= {"--image": image, "--namespace": namespace, "--claim": claim, "--mount": mount}
    check_job(job, where, options)
    if where == "local":
        _start_here(job.agent(["--standalone"]), job.environment, dry_run)
    elif where == "slurm":
        from megatron_mtp.launch import slurm

        text = slurm.render(
            job, partition=partition, account=account, time=time, cpus_per_node=cpus_per_node, more=sbatch or []
        )
        _submit(text, ["sbatch"], dry_run)
    else:
        from megatron_mtp.launch import k8s

        if image is None:
            raise ConfigError("--image: Kubernetes needs a container image. Name one that contains megatron-mtp.")
        text = k8s.render(job, image=image, namespace=namespace, claim=claim, mount=mount)
        _submit(text, ["kubectl", "apply", "-f", "-"], dry_run)


def _start_here(command: str, environment: dict[str, str], dry_run: bool) -> None:
    if dry_run:
        typer.echo(" ".join([*(f"{name}={value}" for name, value in environment.items()), command]))
        return
    words = shlex.split(command)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *words[1:]], os.environ | environment)


def _submit(text: str, command: list[str], dry_run: bool) -> None:
    if dry_run:
        typer.echo(text, nl=False)
        return
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: there is no such command on this machine. Submit from a machine that has it, or print the "
            "job with --dry-run and submit it there."
        )
    done = subprocess.run(command, input=text, text=True, check=False)
    raise typer.Exit(done.returncode)
