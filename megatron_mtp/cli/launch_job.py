"""What the commands of `megatron-mtp launch` share: they build a job, check it, print hints and submit it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megatron_mtp.cli.choose import check_named_callbacks, choose_config
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mtp.launch.job import Job
    from megatron_mtp.launch.slurm import Request
    from megatron_mtp.launch.view import View


def make_job(
    program: tuple[str | None, list[str] | None, list[Path] | None, Path | None],
    *,
    is_cpu: bool = False,
    nodes: int = 1,
    gpus_per_node: int,
    name: str | None = None,
    callbacks: list[str] | None = None,
    **fields: Any,
) -> Job:
    """The job that runs a recipe or a script; its config's problems are left to `check`.

    Args:
        program: recipe, words after it, config files, script.
        is_cpu: a script's ranks need no GPUs.
        callbacks: names to add to train.callbacks.
    """
    from megatron_mtp.launch.job import Job
    from megatron_mtp.recipes.own import absolute

    recipe, words, config, script = program
    fields |= {"nodes": nodes, "gpus_per_node": gpus_per_node}
    if script is not None:
        for option, value in (("--config", config), ("--callback", callbacks)):
            if value:
                raise ConfigError(f"{option}: a script reads its own config. Leave it out, or pass it after '--'.")
        cfg = ConfigContainer()
        cfg.dist.device = "cpu" if is_cpu else "auto"
        given = [*([] if recipe is None else [recipe]), *(words or [])]
        chosen = name or script.stem.replace("_", "-")
        return Job(cfg=cfg, script=script, arguments=given, name=chosen, **fields)
    if recipe is None:
        raise ConfigError("Name a recipe (`megatron-mtp recipes` lists them), or a script: --script FILE.")
    if is_cpu:
        raise ConfigError("--cpu: works only with --script. Set dist.device=cpu.")
    cfg = choose_config(recipe, config, words, callbacks)
    try:
        cfg.finalize(nodes * gpus_per_node)
        check_named_callbacks(cfg)
    except ConfigError as error:  # `check` reports them, with those of the job
        fields["problems"] = error.problems
    chosen = name or recipe.rpartition(":")[2].replace("_", "-")
    return Job(cfg=cfg, recipe=absolute(recipe), files=config or [], arguments=words or [], name=chosen, **fields)


def check(job: Job, kind: str, options: Mapping[str, str | Sequence[str] | None], view: View | None = None) -> None:
    """Raises ConfigError with every problem of a job, of its options, and of its paths where `view` is known."""
    from megatron_mtp.launch.job import job_problems
    from megatron_mtp.launch.options import option_problems
    from megatron_mtp.launch.view import file_problems, path_problems

    problems = [*job_problems(job, kind), *option_problems(kind, {**options, "--logs": job.logs})]
    problems += path_problems(job, view) if view is not None else []
    problems += file_problems(job, view) if view is not None and kind == "slurm" else []
    if problems:
        raise ConfigError(problems)


def hint(job: Job, kind: str, view: View, secrets: Mapping[str, str] | None = None) -> None:
    """Prints advice beside what is submitted.

    Args:
        secrets: variable -> file that a node reads it from.
    """
    from megatron_mtp.launch.hints import job_hints

    for advice in job_hints(job, kind, view, secrets or {}):
        typer.echo(f"hint: {advice}", err=True)


def start_here(job: Job, dry_run: bool) -> None:
    """Becomes the agent of a job on this machine."""
    from megatron_mtp.launch.job import same_path

    logs = None if job.logs is None else shlex.quote(job.logs)
    command = job.agent(["--standalone"], same_path, logs)
    if dry_run:
        typer.echo(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in job.environment.items()), command]))
        return
    sys.stdout.flush()
    os.execve(sys.executable, shlex.split(command), os.environ | job.environment)


def submit_chain(job: Job, request: Request, chain: int, dry_run: bool) -> None:
    """Submits a job `chain` times, each after the one before."""
    from megatron_mtp.launch.slurm import render

    if dry_run and chain > 1:
        text = (
            f"--chain {chain}: this is the first of {chain} jobs; each waits for the one before (dependency=afterok)."
        )
        typer.echo(f"hint: {text}", err=True)
    for _ in range(1 if dry_run else chain):
        printed = submit(render(job, request), ["sbatch", "--parsable"], dry_run)
        number = printed.strip().partition(";")[0]  # a cluster's name may follow
        if not dry_run:
            typer.echo(f"submitted job {number}")
        request = replace(request, after=number)


def submit(text: str, command: list[str], dry_run: bool) -> str:
    """Hands a job to the scheduler and returns what that says; leaves with its exit code if it refuses."""
    if dry_run:
        typer.echo(text, nl=False)
        return ""
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: there is no such command on this machine. Submit from a machine that has it, or print the "
            "job with --dry-run and submit it there."
        )
    done = subprocess.run(command, input=text, text=True, check=False, stdout=subprocess.PIPE)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout
