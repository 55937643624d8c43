"""`megatron-mtp plan`: predicts pipeline split, step time and memory. Imports neither torch nor Megatron-Core."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mtp.cli.choose import Files, Overrides, Recipe, choose_config, open_vocabulary

if TYPE_CHECKING:
    from megatron_mtp.plan.compare import Plans


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    config: Files = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices of the job; default: those that `recipes` lists.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Device to estimate for: h100, h200, b200, gb300, mi300x, cpu ...")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Measured part times, from `megatron-mtp profile`.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of one device; 0: no limit. Default: the hardware's.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help='Another split, "5,6,6,4" or "Et*5|t*6|t*6|t*4mL"; may be repeated.')
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="Software that this trainer lacks: fp8=mxfp8, graphs=all, overlap_experts=true ...; may be repeated."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help='Tokens of the whole training, "15T": days, device hours, cost of MTP depths.')
    ] = None,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="With --tokens: mean hours between failures of one device (Llama 3: 50,000).")
    ] = None,
    save_s: Annotated[
        float | None, typer.Option(help="With --tokens: seconds that training stands still for a save; default 30.")
    ] = None,
    restart_s: Annotated[
        float | None, typer.Option(help="With --tokens: seconds from a failure to the next step; default 600.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="With --tokens: price of one device for one hour.")] = None,
    watts: Annotated[
        float | None, typer.Option(help="With --tokens: watts of one device, its share of node and cooling included.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Rank parallel sizes, micro-batch and recomputation too.")
    ] = False,
    or_devices: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="With --search and --tokens: another number of devices; ranked by device hours; may be repeated.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the search's table.")] = 10,
    write: Annotated[Path | None, typer.Option(help="Write the choice as YAML for `pretrain --config`.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the schedule as an SVG picture.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Plan the pipeline: the fastest split, with the time and memory of each stage. Needs no device.

    With the layout "auto" it searches for the fastest split; another layout is planned as it is. --compare adds splits.
    Of a run with phases each is planned.
    """
    from megatron_mtp.parallel.planner.assume import read_assumptions
    from megatron_mtp.plan.compare import default_devices, make_plans
    from megatron_mtp.plan.phases import phase_plans, refuse_phases
    from megatron_mtp.plan.report import as_data, as_text, overlay
    from megatron_mtp.plan.training import read_budget

    _check_files(picture, write, assume)
    cfg = choose_config(recipe, config, overrides)
    open_vocabulary(cfg)
    if devices is None and not search:
        devices = default_devices(recipe, cfg)
    assumptions = read_assumptions(assume or ())
    refuse_phases(cfg, {"--search": search, "--tokens": tokens})
    costs = {"mtbf_hours": mtbf_hours, "save_s": save_s, "restart_s": restart_s, "price": price, "watts": watts}
    budget = read_budget(tokens, **costs)
    options = (cfg, devices, hardware, profile, memory, compare or (), assumptions, budget, or_devices or ())
    if search:
        plans, phases = _searched(options, top), []
    else:
        plans = make_plans(*options)
        later = (plans.world_size, hardware, None, memory, (), assumptions)
        # A profile is measured for one config.
        phases = [] if profile else phase_plans(plans, lambda present: make_plans(present, *later))
    if json:
        typer.echo(json_format.dumps(as_data(recipe, plans, phases), indent=2))
    else:
        typer.echo(as_text(recipe, plans, phases))
    if write is not None:
        write_file(write, overlay(recipe, plans), "--write")
    if picture is not None:
        _draw(picture, plans, recipe)


def _draw(path: Path, plans: Plans, recipe: str) -> None:
    from megatron_mtp.parallel.planner.picture import draw

    write_file(path, draw(plans.planner, plans.chosen, title=recipe), "--picture")


def _searched(options: tuple[Any, ...], top: int) -> Plans:
    """The best plans over parallel sizes; what is searched is shown on the terminal."""
    from rich.console import Console

    from megatron_mtp.plan.compare import make_plans

    with Console(stderr=True).status("searching") as status:
        return make_plans(*options, search=True, top=top, report=status.update)


def _check_files(picture: Path | None, write: Path | None, assume: list[str] | None) -> None:
    from megatron_mtp.errors import PlanError, Problem

    if picture is not None and picture.suffix.lower() != ".svg":
        better = picture.parent / f"{picture.stem or 'schedule'}.svg"
        remedy = f"Use --picture {str(better)!r}."
        raise PlanError(Problem(fields=("--picture",), value=str(picture), rule="the picture is SVG", remedy=remedy))
    if write is not None and assume:
        rule = "writes a config to train with, and no config has what --assume adds"
        raise PlanError(Problem(fields=("--write",), rule=rule, remedy="Leave out --write or --assume."))


def write_file(path: Path, text: str, option: str) -> None:
    """Writes a file that an option names.

    Raises:
        PlanError: it cannot be written.
    """
    from megatron_mtp.errors import PlanError, Problem

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        problem = Problem(fields=(option,), value=str(path), rule=rule, remedy="Name another file.")
        raise PlanError(problem) from None
    typer.echo(f"wrote {path}", err=True)
