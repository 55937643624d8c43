"""`megatron-mtp data show|info|check|merge|split`: looks at prepared data, and makes other data sets of it."""

from __future__ import annotations

import json as json_format
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mtp.cli.addresses import accepts_addresses
from megatron_mtp.cli.choose import Files, Overrides, choose_config
from megatron_mtp.storage.address import is_address

if TYPE_CHECKING:
    from megatron_mtp.config import ConfigContainer
    from megatron_mtp.data.merging import Written
    from megatron_mtp.data.object_file import ObjectCache
    from megatron_mtp.data.tokenizer import Tokenizer

data = typer.Typer(no_args_is_help=True, help="Look at prepared data, check it, merge and split it.")

Prefixes = Annotated[
    list[str], typer.Argument(metavar="PREFIX...", help="Data sets as in dataset.blend; endings are ignored.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files of that name.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@data.command()
@accepts_addresses("source")
def show(
    source: Annotated[str, typer.Argument(metavar="RECIPE|PREFIX", help="A run's recipe, or one data set.")],
    overrides: Overrides = None,
    config: Files = None,
    sample: Annotated[int, typer.Option(min=0, help="Position in the training order, from 0.")] = 0,
    depths: Annotated[
        bool, typer.Option("--depths", help="One line for each slot, with the target of each depth.")
    ] = False,
) -> None:
    """Show a training sample as text: targets without a loss in grey, or as [-text-] where there are no colours.

    It is made by the rules of the run: model.seq_length, dataset.eod_mask_loss, dataset.loss_mask_suffix and so on. For
    a PREFIX, give tokenizer.tokenizer_type=... tokenizer.tokenizer_model=... to see text in place of ids.
    """
    from megatron_mtp.data.object_file import scratch_cache

    prefix = _without_ending(source)
    with scratch_cache([prefix]) as cache:
        if is_address(prefix) or Path(f"{prefix}.idx").exists():
            cfg = _config_of(prefix, cache)
        else:
            _check_recipe(source, prefix)
            cfg = choose_config(source, None, None)
        _change(cfg, config, overrides)
        _show(cfg, prefix, sample, depths=depths)


def _show(cfg: ConfigContainer, prefix: str, sample: int, *, depths: bool) -> None:
    from megatron_mtp.data.loader import DataPlacement, build_data
    from megatron_mtp.data.looking import Marks, as_table, as_text, header
    from megatron_mtp.data.tokenizer import configured_tokenizer, resolve_vocab_size

    _only_training(cfg)
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = resolve_vocab_size(cfg)
    cfg.finalize()
    tokenizer = configured_tokenizer(cfg)
    decode = _decoder(tokenizer)
    module = build_data(cfg, DataPlacement(), cfg.model.mtp_num_layers)
    try:
        found, batch, origin = module.look(sample)
    finally:
        module.close()
    marks = Marks.of(sys.stdout)
    typer.echo("\n".join(header(found, batch, f"sample {sample} of the training order: {origin}")), color=True)
    typer.echo(f"targets without a loss: {marks.around('like this')}", color=True)
    if _shows_ids(tokenizer):
        typer.echo(_how_to_text(prefix))
    typer.echo()
    lines = as_table(found, batch, decode, marks) if depths else [as_text(found, batch, decode, marks)]
    for line in lines:
        typer.echo(line, color=True)


@data.command()
@accepts_addresses("prefixes")
def info(prefixes: Prefixes, json: Json = False) -> None:
    """Print what data sets hold: documents, tokens, type, tokenizer, lengths of the documents."""
    from megatron_mtp.data.information import describe
    from megatron_mtp.data.object_file import scratch_cache

    with scratch_cache(prefixes) as cache:
        rows = [describe(prefix, cache) for prefix in _names(prefixes)]
    if json:
        typer.echo(json_format.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo("\n".join(_info_lines(row)))


@data.command()
@accepts_addresses("prefixes")
def check(prefixes: Prefixes) -> None:
    """Compare .bin and .idx files with the checksums that `prepare` recorded. Reads all of them."""
    from megatron_mtp.data.check import check_files
    from megatron_mtp.data.object_file import scratch_cache
    from megatron_mtp.errors import DataError

    problems = []
    with scratch_cache(prefixes) as cache:
        for prefix in _names(prefixes):
            try:
                found = check_files(prefix, cache)
            except DataError as error:
                problems.append(str(error))
                continue
            outcome = "checksums match" if found.has_checksums else "index and sizes fit; no checksums were recorded"
            typer.echo(f"{prefix}: {found.num_documents:,} documents, {found.num_tokens:,} tokens, {outcome}")
    if problems:
        raise DataError("\n".join(problems))


@data.command()
def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Prefix of the result.")],
    prefixes: Prefixes,
    overwrite: Overwrite = False,
) -> None:
    """Write the documents of several data sets to one. They must come from one tokenizer."""
    from megatron_mtp.data.merging import merge

    _report(merge(_without_ending(out), _names(prefixes), overwrite=overwrite))


@data.command()
def split(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Data set to divide.")],
    shares: Annotated[str, typer.Option(help="Train, validation and test, in any unit; 0 leaves one out.")] = "98,1,1",
    output: Annotated[str | None, typer.Option(metavar="OUT", help="Prefix of the results; default: PREFIX.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the documents of a data set to OUT_train, OUT_valid and OUT_test, as dataset.split would divide them."""
    from megatron_mtp.config.blend import parse_split
    from megatron_mtp.data.merging import split
    from megatron_mtp.errors import ConfigError, Problem

    try:
        parse_split(shares)
    except ValueError as error:
        raise ConfigError(Problem(fields=("--shares",), value=shares, rule=str(error))) from None
    prefix = _without_ending(prefix)
    for written in split(prefix, shares, _without_ending(output or prefix), overwrite=overwrite):
        _report(written)


def _check_recipe(source: str, prefix: str) -> None:
    """Raises ConfigError for a name that is neither a recipe nor a file with one: it may be a mistyped prefix."""
    from megatron_mtp.errors import ConfigError, nearest
    from megatron_mtp.recipes import RECIPES, REFUSED

    if ":" in source or source.endswith(".py") or source in RECIPES or source in REFUSED:
        return
    raise ConfigError(
        f"{source}: there is neither a recipe nor data of that name ({prefix}.idx is missing)."
        f"{nearest(source, RECIPES, count=2)} `megatron-mtp recipes` lists the recipes; data is named by its prefix, "
        "from the working directory."
    )


def _names(prefixes: list[str]) -> list[str]:
    return list(dict.fromkeys(map(_without_ending, prefixes)))


def _without_ending(prefix: str) -> str:
    return re.sub(r"\.(bin|idx|json)$", "", prefix)


def _report(written: Written) -> None:
    note = "" if written.has_sidecar else "; without a sidecar, as its source"
    typer.echo(f"{written.prefix}: {written.num_documents:,} documents, {written.num_tokens:,} tokens{note}")


def _config_of(prefix: str, cache: ObjectCache | None) -> ConfigContainer:
    """A config that trains on all of one data set, with the tokenizer where its sidecar is enough to open it."""
    import numpy as np

    from megatron_mtp.data.indexed import IndexedReader
    from megatron_mtp.data.sidecar import Sidecar

    cfg = choose_config("tiny_dense", None, None)
    cfg.dataset.update(mock=False, blend=[prefix], blend_per_split=None, split="1,0,0")
    if cache is not None:
        gib = cache.blocks.limit / 2**30
        cfg.dataset.update(object_storage_cache_path=str(cache.folder), object_storage_cache_gib=gib)
    reader, sidecar = IndexedReader(prefix, cache), Sidecar.load(prefix)
    cfg.model.vocab_size = 1 + int(np.iinfo(reader.dtype).max) if sidecar is None else sidecar.vocab_size
    if sidecar is not None and sidecar.tokenizer_type == "bytes":
        cfg.tokenizer.tokenizer_type = "bytes"
    else:
        cfg.tokenizer.tokenizer_type = "null"
        cfg.model.vocab_size += 1  # its last id ends a document: one that does not occur, so that only stored ends do
    return cfg


def _change(cfg: ConfigContainer, files: list[Path] | None, overrides: list[str] | None) -> None:
    from megatron_mtp.config.overrides import apply_overrides, apply_yaml

    for file in files or []:
        apply_yaml(cfg, file)
    apply_overrides(cfg, overrides or [])


def _only_training(cfg: ConfigContainer) -> None:
    """Leaves validation sets and checkpoints out of a config: they need not exist to look at a sample."""
    cfg.validation.update(eval_iters=0)
    cfg.checkpoint = type(cfg.checkpoint)()


def _decoder(tokenizer: Tokenizer | None) -> Any:
    if tokenizer is not None and not _shows_ids(tokenizer):
        return tokenizer.decode
    return lambda ids: " ".join(map(str, ids)) + " "


def _shows_ids(tokenizer: Tokenizer | None) -> bool:
    return tokenizer is None or tokenizer.kind == "null"


def _how_to_text(prefix: str) -> str:
    """What to add to the command to see text in place of ids."""
    from megatron_mtp.data.sidecar import Sidecar

    sidecar = Sidecar.load(prefix) if is_address(prefix) or Path(f"{prefix}.idx").exists() else None
    if sidecar is not None and sidecar.tokenizer_type == "null":
        return "token ids: the data was made from ids, without a tokenizer"
    kind = "huggingface" if sidecar is None else sidecar.tokenizer_type
    return f"token ids; for text add tokenizer.tokenizer_type={kind} tokenizer.tokenizer_model=FILE"


def _info_lines(row: dict[str, Any]) -> list[str]:
    lengths = row["lengths"]
    spread = ", ".join(f"{name} {value:,.0f}" for name, value in lengths.items())
    tokenizer = ["  tokenizer  unknown: it has no sidecar"]
    if row["tokenizer"] is not None:
        ends = f"documents end with {row['eod']}" if row["append_eod"] else "documents have no end mark"
        ids = f"{row['vocab_size']:,}, the largest here {row['largest_id']}; {ends}"
        tokenizer = [f"  tokenizer  {row['tokenizer']}", f"  ids        {ids}"]
    return [
        row["prefix"],
        f"  documents  {row['documents']:,}",
        f"  tokens     {row['tokens']:,} ({row['dtype']}, {row['bytes'] / 2**20:,.1f} MiB)",
        f"  lengths    {spread}",
        *tokenizer,
    ]
