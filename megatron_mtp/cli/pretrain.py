"""`megatron-mtp pretrain`: trains a model, or with --dry-run reports what every rank would hold."""

from __future__ import annotations

import json as json_format
import os
import sys
from dataclasses import replace
from typing import Annotated

import typer

from megatron_mtp.cli.choose import Callbacks, Files, Overrides, Recipe, check_named_callbacks, choose_config
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.entry import exit_code
from megatron_mtp.launch.failure import message


def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    callback: Callbacks = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Start this many processes on this machine. Leave it out under torchrun.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Do not train: build every distinct rank without memory, print what it holds and what would fail.",
        ),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: processes of the job. Default: as few as the parallel sizes allow."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="With --dry-run: device whose memory every stage must fit, such as h100.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print everything as JSON.")] = False,
) -> None:
    """Train a model. Under torchrun it joins the job; otherwise it runs as one process, or as --nproc of them."""
    cfg = choose_config(recipe, config, overrides, callback)
    if dry_run:
        from megatron_mtp.config.phase_configs import fewest_processes

        processes = world_size or nproc or fewest_processes(cfg.copy().finalize())
        cfg.copy().finalize(processes)  # before torch is imported
        check_named_callbacks(cfg)
        return _dry_run(cfg, processes, hardware=hardware, json=json)
    for name, given in (("--json", json), ("--world-size", world_size), ("--hardware", hardware)):
        if given:
            raise ConfigError(f"{name}: works only with --dry-run. Add --dry-run, or leave it out.")
    is_rank = "RANK" in os.environ
    if nproc is not None and is_rank:
        raise ConfigError(f"--nproc {nproc}: torchrun has started the processes already. Leave --nproc out.")
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if is_rank else nproc or 1
    cfg.copy().finalize(world_size)  # before torch is imported or a process is started
    check_named_callbacks(cfg)
    if world_size > 1 and not is_rank:
        from megatron_mtp.config.overrides import as_override
        from megatron_mtp.launch.local import run_ranks

        files = [argument for file in config or [] for argument in ("--config", str(file))]
        changes = [*(overrides or []), *([as_override("train.callbacks", cfg.train.callbacks)] if callback else [])]
        command = [sys.executable, "-m", "megatron_mtp", "pretrain", recipe, *files, "--", *changes]
        raise typer.Exit(run_ranks(command, world_size, cfg.dist.preempted_exit_code))
    from megatron_mtp.training.pretrain import pretrain as train

    raise typer.Exit(exit_code(lambda: train(cfg, recipe=recipe)))


def _dry_run(cfg: ConfigContainer, world_size: int, *, hardware: str | None, json: bool) -> None:
    """Builds every distinct rank without memory or messages and prints what it holds, for each phase of the run.

    Args:
        cfg: unfinalized, checked for `world_size`.
        hardware: device whose memory every stage must fit; None: not checked.

    Raises:
        ConfigError: what would fail at launch, after the report was printed.
    """
    from megatron_mtp.config.machines import find_machine

    limit_gib = find_machine(hardware, "--hardware").memory_gib if hardware else None
    from rich.console import Console

    from megatron_mtp.config.timeline import Timeline
    from megatron_mtp.dry_run.build import dry_run
    from megatron_mtp.dry_run.table import as_dict, print_dry_run
    from megatron_mtp.parallel.resolve import resolve_phase
    from megatron_mtp.training.pretrain import prepare_config

    cfg = prepare_config(cfg, world_size)
    timeline = Timeline.of(cfg)
    with Console(stderr=True).status("starting") as status:
        runs = [resolve_phase(timeline, index, world_size) for index in range(len(timeline.phases))]
        everything = [dry_run(run, limit_gib, status.update) for run in runs]
    first, *later = everything
    names = [phase.name for phase in timeline.phases]
    problems = list(first.problems)
    for name, found in zip(names[1:], later, strict=True):
        problems += [replace(one, where=f"phases.{name}") for one in found.problems if one not in first.problems]
    if json:
        data = as_dict(first, cfg)
        if later:
            pairs = zip(names[1:], later, runs[1:], strict=True)
            data["phases"] = [{"name": name, **as_dict(found, run.cfg)} for name, found, run in pairs]
        typer.echo(json_format.dumps(data, indent=2, default=str))
        if problems:  # the report holds them: no second JSON object
            typer.echo(message(ConfigError(problems)), err=True)
            raise typer.Exit(ConfigError.exit_code)
        return
    typer.echo(cfg.to_yaml())
    for name, found in zip(names, everything, strict=True):
        if later:
            typer.echo(f"phase {name}")
        print_dry_run(found, Console())
    if problems:
        raise ConfigError(problems)
