"""`megatron-mtp profile`: measured part times for `megatron-mtp plan --profile`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mtp.cli.choose import Files, Overrides, Recipe, choose_config
from megatron_mtp.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mtp.config import ConfigContainer
    from megatron_mtp.parallel.planner.part_costs import Profile


def profile(
    recipe: Recipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile, as JSON.")],
    overrides: Overrides = None,
    config: Files = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="On a CPU: processes, as many as the run has on this machine. Default: one model's."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of 4 micro-batches.")] = 6,
) -> None:
    """Time each part of a model on this device, sharded as configured.

    Trains a few layers of each kind on mock data. On GPUs it starts one pipeline stage's ranks, unless torchrun does.
    """
    cfg = choose_config(recipe, config, overrides)
    cfg.copy().finalize()  # before torch is imported
    _check_writable(output)
    from megatron_mtp.observe.logs import silence_noise

    silence_noise()
    from megatron_mtp.device.select import pick_device
    from megatron_mtp.profile.job import block_size, profile_in_job
    from megatron_mtp.training.pretrain import prepare_config

    cfg, is_rank = prepare_config(cfg, None), "RANK" in os.environ
    block = block_size(cfg)
    if not is_rank and not pick_device(cfg.dist.device).is_cuda:
        found = _on_cpu(cfg, nproc, steps)
    elif not is_rank and block > 1:
        from megatron_mtp.launch.local import run_ranks

        files = [argument for file in config or [] for argument in ("--config", str(file))]
        command = [sys.executable, "-m", "megatron_mtp", "profile", recipe, *files, "--output", str(output)]
        raise typer.Exit(run_ranks([*command, "--steps", str(steps), "--", *(overrides or [])], block))
    else:
        found = profile_in_job(cfg, steps)
    if os.environ.get("RANK", "0") == "0":
        found.write(output)
        _print(found)
        typer.echo(found.notes["noise_in_words"])
        typer.echo(f"wrote {output}", err=True)


def _on_cpu(cfg: ConfigContainer, nproc: int | None, steps: int) -> Profile:
    from rich.console import Console

    from megatron_mtp.config.checks.parallel import minimum_world_size
    from megatron_mtp.profile.job import CpuProfiler, block_size

    block, processes = block_size(cfg), nproc or minimum_world_size(cfg.model)
    if processes % block:
        raise ConfigError(
            f"--nproc {processes}: a pipeline stage of this config takes {block} processes that compute together. "
            f"Use a multiple of {block}."
        )
    with Console(stderr=True).status("starting") as status, CpuProfiler(cfg, processes) as profiler:
        for step in range(steps):
            status.update(f"step {step + 1} of {steps}")
            profiler.advance(1)
        status.update("timing messages")
        return profiler.profile()


def _check_writable(output: Path) -> None:
    folder = output.parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {output}: cannot be written. Name a file in a folder that exists and is writable.")


def _print(found: Profile) -> None:
    costs = found.costs
    rows = {"embedding": costs.embedding}
    rows |= {f"decoder layer, {kind}": time for kind, time in costs.layer.items()}
    rows |= {
        "final norm": costs.final_norm,
        "MTP layer": costs.mtp_layer,
        "head and loss, depth 0": costs.head,
        "head and loss, further depth": costs.mtp_head,
        "call of a chunk": costs.chunk,
    }
    typer.echo(f"{'':<30} {'forward':>9} {'backward':>9}  ms for each micro-batch on {found.device}")
    for name, time in rows.items():
        typer.echo(f"{name:<30} {time.forward_ms:>9.3f} {time.backward_ms:>9.3f}")
    typer.echo(
        f"each step {costs.step_ms:.3f} ms; each parameter {costs.update_ns_per_parameter:.3f} ns for its gradient and "
        f"{costs.optimizer_ns_per_parameter:.3f} ns for its update"
    )
