"""`megatron-mtp checkpoint list|show|verify|average|strip|rm`: looks at checkpoints and makes new ones from them."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mtp.cli.addresses import accepts_addresses

if TYPE_CHECKING:
    from megatron_mtp.checkpoint.manifest import Manifest
    from megatron_mtp.checkpoint.merging import Merged

checkpoint = typer.Typer(
    no_args_is_help=True,
    help="Look at checkpoints, check them, remove them, average them. RUN@200, RUN@best (lowest loss, by "
    "checkpoint.best_metric) and RUN@latest name one of a run directory; RUN alone is the newest. RUN may be an "
    "address, such as s3://bucket/run.",
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or its address.")]
One = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="RUN, RUN@200, RUN@best, or a checkpoint's folder.")]
Many = Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="As RUN@200; each must name an iteration.")]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="New run directory; must hold no checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@checkpoint.command("list")
@accepts_addresses("run")
def list_(run: Run, json: Json = False) -> None:
    """List the checkpoints of a run, oldest first, incomplete ones with the reason."""
    from megatron_mtp.checkpoint.directory import RunDirectory, by_validation_loss, deciding_metric, why_empty
    from megatron_mtp.errors import CheckpointError

    directory = RunDirectory(run)
    rows: list[dict[str, Any]] = []
    found: list[Manifest] = []
    for iteration in reversed(directory.iterations()):
        try:
            found.append(directory.read(iteration))
            rows.append(_as_row(found[-1]))
        except CheckpointError as error:
            rows.append({"iteration": iteration, "problem": str(error)})
    if not rows:
        raise CheckpointError(f"{run}: {why_empty(run)}.")
    best, metric = by_validation_loss(found)[:1], deciding_metric(found)
    for row in rows:
        row["is_best"] = bool(best) and row["iteration"] == best[0].iteration
    if json:
        typer.echo(json_format.dumps(rows, indent=2))
        return
    typer.echo(f"{'iteration':>9}  {'size':>10}  {'loss':>8}   saved (UTC)       why")
    for row in rows:
        if "problem" in row:
            typer.echo(f"{row['iteration']:>9}  not complete: {row['problem']}")
            continue
        decides = row["validation_loss"] if metric is None else row["validation_losses"].get(metric)
        loss = "" if decides is None else f"{decides:.4f}"
        mark, saved = "*" if row["is_best"] else " ", row["saved_at"][:16].replace("T", " ")
        text = f"{row['iteration']:>9}  {_size(row['bytes']):>10}  {loss:>8}{mark}  {saved:<16}  {row['reason']}"
        typer.echo(text.rstrip())
    total = _size(sum(row.get("bytes", 0) for row in rows))
    meaning = f"{metric or 'lm loss of the first set'} at that iteration"
    typer.echo(f"\n{total} in all. loss: {meaning}{'; * RUN@best' if best else ''}.")
    if any(len(manifest.validation_losses) > 1 for manifest in found):
        typer.echo("\n" + "\n".join(_loss_lines({str(m.iteration): m.validation_losses for m in found})))


@checkpoint.command()
@accepts_addresses("checkpoint")
def show(checkpoint: One, json: Json = False) -> None:
    """Show what one checkpoint holds, and what wrote it."""
    from megatron_mtp.checkpoint.stored import StoredWeights
    from megatron_mtp.checkpoint.train_state import read_train_state

    stored = StoredWeights(checkpoint, verify=False)
    counts: dict[str, dict[str, int]] = {"mtp": {"tensors": 0, "values": 0}, "main": {"tensors": 0, "values": 0}}
    for key, tensor in stored.tensors.items():
        count = counts["mtp" if ".mtp." in f".{key}" else "main"]
        count["tensors"] += 1
        count["values"] += tensor.size.numel()
    dtypes = sorted({str(stored.dtype(key)).removeprefix("torch.") for key in stored.tensors})
    data = {"folder": str(stored.folder), **_as_row(stored.manifest), "weights": counts, "dtypes": dtypes}
    data |= {"also": stored.left_out, "versions": stored.manifest.versions, "world_size": stored.manifest.world_size}
    data["phases"] = read_train_state(stored.folder, stored.manifest)[0].get("phases", [])
    if json:
        typer.echo(json_format.dumps(data, indent=2))
        return
    typer.echo(stored.folder)
    loss, losses = stored.manifest.validation_loss, stored.manifest.validation_losses
    lines = {
        "iteration": f"{data['iteration']}, {data['consumed_samples']:,} samples",
        "saved": f"{data['saved_at'] or 'time unknown'}: {data['reason']}",
        "validation": "no evaluation at this iteration" if loss is None else "" if losses else f"lm loss {loss:.4f}",
        "weights": f"{counts['main']['values']:,} values in {counts['main']['tensors']} tensors, {', '.join(dtypes)}",
        "MTP layers": f"{counts['mtp']['values']:,} values in {counts['mtp']['tensors']} tensors",
        "also": ", ".join(f"{kind} ({count})" for kind, count in stored.left_out.items()) or "nothing",
        "size": f"{_size(data['bytes'])} in {len(stored.manifest.files)} files",
        "versions": ", ".join(f"{name} {version}" for name, version in stored.manifest.versions.items()) or "unknown",
    }
    if data["phases"]:
        lines["phases"] = ", ".join(f"{phase['name']} from iteration {phase['iteration']}" for phase in data["phases"])
    for name, text in lines.items():
        typer.echo(f"  {name:<11} {text}".rstrip())
        for line in _loss_lines({"": losses}) if name == "validation" and losses else ():
            typer.echo(f"    {line}")


@checkpoint.command()
@accepts_addresses("checkpoints")
def verify(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="RUN (all of its checkpoints), RUN@200, or a folder.")
    ],
) -> None:
    """Compare every byte with the manifests. Exits with 2 if a checkpoint is damaged."""
    from megatron_mtp.checkpoint.directory import RunDirectory, checkpoint_folder
    from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, read_verified
    from megatron_mtp.errors import CheckpointError
    from megatron_mtp.storage.place import place

    problems = []
    for name in checkpoints:
        directory = RunDirectory(name)
        iterations = [] if (place(name) / MANIFEST_NAME).exists() else directory.iterations()
        try:
            folders = [directory.final_path(iteration) for iteration in iterations] or [checkpoint_folder(name)]
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for folder in reversed(folders):
            try:
                manifest = read_verified(folder)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            size = sum(entry.size for entry in manifest.files)
            typer.echo(f"{folder}: intact, {len(manifest.files)} files, {_size(size)}")
    if problems:
        raise CheckpointError("\n".join(problems))


@checkpoint.command()
@accepts_addresses("checkpoints", "output")
def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="As RUN@200; with --last, one run directory.")
    ],
    output: Out,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=2, help="Average the newest N checkpoints of the run.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the mean of the weights of several checkpoints, which a new run can start from.

    Sums are in fp64 and rounded once. The result has no optimizer state: use it as checkpoint.pretrained_checkpoint,
    with `generate`, `evaluate` or `convert export`.
    """
    from megatron_mtp.checkpoint.directory import newest_names
    from megatron_mtp.checkpoint.merging import average
    from megatron_mtp.errors import ConfigError

    if last is not None and len(checkpoints) > 1:
        raise ConfigError(f"--last {last}: needs one run directory, and {len(checkpoints)} checkpoints are named.")
    names = checkpoints if last is None else newest_names(checkpoints[0], last)
    _print_merged(_with_progress(lambda progress: average(names, output, progress)), json)


@checkpoint.command()
@accepts_addresses("checkpoint", "output")
def strip(checkpoint: One, output: Out, json: Json = False) -> None:
    """Write the weights of a checkpoint without optimizer and random state, about a seventh of its size."""
    from megatron_mtp.checkpoint.merging import strip

    _print_merged(_with_progress(lambda progress: strip(checkpoint, output, progress)), json)


@checkpoint.command()
@accepts_addresses("checkpoints")
def rm(
    checkpoints: Many,
    force: Annotated[bool, typer.Option("--force", help="Also if no complete checkpoint of the run is left.")] = False,
) -> None:
    """Remove checkpoints of runs that no process trains in."""
    from megatron_mtp.checkpoint.removing import remove

    for folder in remove(checkpoints, force=force):
        typer.echo(f"removed {folder}")


def _loss_lines(losses: dict[str, dict[str, float]]) -> list[str]:
    """A table of all losses: one line for each iteration and validation set, one column for each depth.

    Args:
        losses: iteration (or "") -> "SET/LOSS" -> loss.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for iteration, found in losses.items():
        for key, loss in found.items():
            name, _, depth = key.partition("/")
            rows.setdefault((iteration, name), {})[depth] = f"{loss:.4f}"
    depths = list(dict.fromkeys(depth for row in rows.values() for depth in row))
    first = "iteration" if any(losses) else ""
    width = max(len("set"), *(len(name) for _, name in rows))
    lines = [f"{first}  {'set':<{width}}" + "".join(f"  {depth:>10}" for depth in depths)]
    for (iteration, name), row in rows.items():
        cells = "".join(f"  {row.get(depth, ''):>10}" for depth in depths)
        lines.append(f"{iteration:>{len(first)}}  {name:<{width}}{cells}")
    return [line.rstrip() if first else line.strip() for line in lines]


def _as_row(manifest: Manifest) -> dict[str, Any]:
    names = (
        "iteration",
        "consumed_samples",
        "validation_loss",
        "validation_losses",
        "best_metric",
        "reason",
        "saved_at",
    )
    return {name: getattr(manifest, name) for name in names} | {"bytes": sum(entry.size for entry in manifest.files)}


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _with_progress(run: Any) -> Merged:
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        return run(lambda done, total: status.update(f"{done} of {total} tensors"))


def _print_merged(merged: Merged, json: bool) -> None:
    if json:
        data = {"folder": str(merged.folder), "tensors": merged.tensors, "left_out": merged.left_out}
        typer.echo(json_format.dumps(data, indent=2))
        return
    left = ", ".join(f"{kind} ({count})" for kind, count in merged.left_out.items())
    typer.echo(f"{merged.folder}: {merged.tensors} tensors{f'; left out: {left}' if left else ''}")
