"""`megatron-mtp pretrain`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from megatron_mtp.cli.choose import Files, Overrides, Recipe, choose_config
from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.agent import note_exit


def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many processes on this machine.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: build every distinct rank without memory or messages, print what it holds and what would fail.",
        ),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: processes of the job. Default: as few as the parallel sizes take."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="With --dry-run: device whose memory every stage must fit, such as h100.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print everything as JSON.")] = False,
) -> None:
    """Train a model. Under torchrun it joins the job; otherwise it runs as one process, or as --nproc of them."""
    cfg = choose_config(recipe, config, overrides)
    if dry_run:
        from megatron_mtp.cli.dry_run import run_dry
        from megatron_mtp.config.checks.parallel import minimum_world_size

        processes = world_size or nproc or minimum_world_size(cfg.model)
        cfg.copy().finalize(processes)  # before torch is imported
        return run_dry(cfg, processes, hardware=hardware, json=json)
    for name, given in (("--json", json), ("--world-size", world_size), ("--hardware", hardware)):
        if given:
            raise ConfigError(f"{name}: belongs to --dry-run. Leave it out, or add --dry-run.")
    is_rank = "RANK" in os.environ
    if nproc is not None and is_rank:
        raise ConfigError(f"--nproc {nproc}: torchrun has started the processes already. Leave --nproc out.")
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if is_rank else nproc or 1
    cfg.copy().finalize(world_size)  # before torch is imported or a process is started
    if world_size > 1 and not is_rank:
        from megatron_mtp.launch.local import run_ranks

        files = [argument for file in config or [] for argument in ("--config", str(file))]
        command = [sys.executable, "-m", "megatron_mtp", "pretrain", recipe, *files, "--", *(overrides or [])]
        raise typer.Exit(run_ranks(command, world_size, cfg.dist.preempted_exit_code))
    from megatron_mtp.observe.logs import silence_noise

    silence_noise()  # before the imports that make it
    from megatron_mtp.training.pretrain import pretrain as train

    code = train(cfg, recipe=recipe).exit_code
    note_exit(code)
    raise typer.Exit(code)
