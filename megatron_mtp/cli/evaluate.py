"""`megatron-mtp evaluate`: held-out loss and acceptance of every depth, for a checkpoint that exists."""

from __future__ import annotations

import json as json_format
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mtp.cli.addresses import accepts_addresses
from megatron_mtp.cli.choose import Overrides
from megatron_mtp.config.blend import set_label
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.signs import empty_agreement
from megatron_mtp.storage.address import is_address

if TYPE_CHECKING:
    from megatron_mtp.training.checkpoint_evaluation import CheckpointEvaluation
    from megatron_mtp.training.evaluation import EvaluationResult


@accepts_addresses("checkpoint", "sets")
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Run directory (its newest checkpoint), RUN@200, RUN@best, or a Hugging Face folder."),
    ],
    overrides: Overrides = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=PREFIX", help="Data set to evaluate in place of the run's; repeatable."),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Start this many processes on this machine. Leave it out under torchrun.")
    ] = None,
    keep_layout: Annotated[
        bool,
        typer.Option("--keep-layout", help="Keep the run's parallel sizes. Default: 1 each, all ranks data-parallel."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Evaluate a checkpoint: losses and acceptance of every depth on the run's validation sets, or on others.

    The batches are those of the run's own evaluations; those of a Hugging Face folder hold 32 samples, which
    train.global_batch_size changes. Changes such as validation.eval_iters=100 (-1: each sample of each set once) or
    model.tensor_model_parallel_size=2 are taken as by `pretrain`. It writes nothing, and calls no
    callbacks. SIGTERM ends it within a batch, with exit code 143 and without losses.
    """
    given = _parse_sets(sets or [])
    is_rank = "RANK" in os.environ
    if nproc is not None and is_rank:
        raise ConfigError(f"--nproc {nproc}: torchrun has started the processes already. Leave --nproc out.")
    from megatron_mtp.config.overrides import apply_overrides
    from megatron_mtp.training.checkpoint_evaluation import evaluate_checkpoint, evaluation_config

    cfg = evaluation_config(checkpoint, given, keep_layout=keep_layout)
    apply_overrides(cfg, overrides or [])
    if not cfg.validation.eval_iters:
        raise ConfigError("validation.eval_iters = 0: nothing would be evaluated. Give the number of batches.")
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if is_rank else nproc or 1
    cfg.copy().finalize(world_size)
    if world_size > 1 and not is_rank:
        from megatron_mtp.launch.local import run_ranks

        options = [argument for text in sets or [] for argument in ("--set", text)]
        options += ["--keep-layout"] * keep_layout + ["--json"] * json
        command = [sys.executable, "-m", "megatron_mtp", "evaluate", checkpoint, *options, "--", *(overrides or [])]
        raise typer.Exit(run_ranks(command, world_size))
    from rich.console import Console

    is_first, console = int(os.environ.get("RANK", "0")) == 0, Console(stderr=True)
    with console.status("reading") if is_first else nullcontext() as status:
        show = status.update if status is not None and console.is_terminal else None
        found = evaluate_checkpoint(cfg, checkpoint, list(given) or None, show=show)
    if is_first:
        data = _as_data(checkpoint, found)
        typer.echo(json_format.dumps(data, indent=2) if json else _as_text(data))


def _parse_sets(texts: list[str]) -> dict[str, str]:
    sets: dict[str, str] = {}
    for text in texts:
        name, _, prefix = text.partition("=")
        if not name or not prefix:
            raise ConfigError(f"--set {text}: must be NAME=PREFIX, such as code=data/code_text_document.")
        if name in sets:
            raise ConfigError(f"--set {text}: the name is given twice.")
        sets[name] = prefix
    for name, prefix in sets.items():
        missing = next((prefix + end for end in (".idx", ".bin") if not os.path.isfile(prefix + end)), None)
        if missing is not None and not is_address(prefix):  # whether objects are there is asked with the data
            raise ConfigError(
                f"--set {name}={prefix}: {missing} is missing or cannot be read. Give the prefix of the "
                "files, without .bin or .idx; relative ones start from the working directory."
            )
    return sets


def _as_data(checkpoint: str, found: CheckpointEvaluation) -> dict[str, Any]:
    rows = {set_label(name): _as_row(result, found.samples[name]) for name, result in found.results.items()}
    about = {"iteration": found.iteration, "layout": found.layout, "batch_size": found.batch_size}
    return {"checkpoint": checkpoint, **about, "sets": rows}


def _as_row(result: EvaluationResult, samples: int) -> dict[str, Any]:
    counts = dict(zip(result.valid_losses(), (n for n in result.depth_counts.tolist() if n), strict=True))
    losses, rates = result.valid_losses(), result.acceptance_rates()
    return {"samples": samples, "losses": losses, "targets": counts, "acceptance": rates}


def _as_text(data: dict[str, Any]) -> str:
    """What was evaluated, and a table: one line for each set and depth."""
    rows, iteration = data["sets"], data["iteration"]
    what = "Hugging Face folder" if iteration is None else f"iteration {iteration:,}"
    layout = ", ".join(f"{axis.upper()} {size}" for axis, size in data["layout"].items())
    width = max(len("set"), *map(len, rows))
    lines = [f"{what}; {layout}; batches of {data['batch_size']:,} samples"]
    lines += [f"{'set':<{width}}  {'':<10}  {'loss':>9}  {'targets':>11}  {'top-1':>6}  {'accepted':>8}"]
    for name, row in rows.items():
        rates = row["acceptance"]
        lines.append(f"{name:<{width}}  {row['samples']:,} samples read")
        for key, loss in row["losses"].items():
            depth = key.removesuffix(" loss")
            cells = [_percent(rates.get(f"{depth}/{rate}")) for rate in ("top1_target", "accepted")]
            targets = row["targets"][key]
            lines.append(f"{name:<{width}}  {key:<10}  {loss:>9.6f}  {targets:>11,}  {cells[0]:>6}  {cells[1]:>8}")
        if "mtp/accepted_length" in rates:
            lines.append(f"{name:<{width}}  {rates['mtp/accepted_length']:.3f} drafted tokens accepted per step")
        if note := empty_agreement(rates):
            lines.append(f"{name:<{width}}  {note}")
    return "\n".join(lines)


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1%}"
