"""`megatron-mtp pretrain --dry-run`: every distinct rank built without memory or messages."""

from __future__ import annotations

import json as json_format

import typer

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError


def run_dry(cfg: ConfigContainer, world_size: int, *, hardware: str | None, json: bool) -> None:
    """Prints what the job would hold.

    Args:
        cfg: unfinalized, checked for `world_size`.
        hardware: device whose memory every stage must fit; None: not checked.

    Raises:
        ConfigError: what would fail at launch, after the report was printed.
    """
    from megatron_mtp.parallel.planner.machines import find_machine

    limit_gib = find_machine(hardware).memory_gib if hardware else None
    from rich.console import Console

    from megatron_mtp.observe.logs import silence_noise

    silence_noise()
    from megatron_mtp.dry_run.build import dry_run
    from megatron_mtp.dry_run.table import as_dict, print_dry_run
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.pretrain import prepare_config

    cfg = prepare_config(cfg, world_size)
    with Console(stderr=True).status("starting") as status:
        found = dry_run(resolve(cfg, world_size), limit_gib, status.update)
    if json:
        typer.echo(json_format.dumps(as_dict(found, cfg), indent=2))
    else:
        typer.echo(cfg.to_yaml())
        print_dry_run(found, Console())
    if found.problems:
        raise ConfigError(found.problems)
