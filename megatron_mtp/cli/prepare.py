"""`megatron-mtp prepare`: text in JSONL or Parquet files to Megatron `.bin/.idx`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mtp.data.prepare.run import Prepared


def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="JSONL files (plain, .gz, .zst), Parquet files, and folders of them."),
    ],
    output: Annotated[Path, typer.Option(help="Prefix of the data sets: PREFIX_text_document.bin, .idx and .json.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, null:VOCAB, a tokenizer.json or its folder, *.model (SentencePiece) or *.tiktoken."),
    ] = None,
    shards: Annotated[
        int, typer.Option(help="Number of data sets to spread the documents over, PREFIX_01_... and so on.")
    ] = 1,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Shuffle all documents; the same seed gives the same files.")
    ] = None,
    json_key: Annotated[str, typer.Option(help="Field of each line, or column, that holds the text.")] = "text",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Number of processes, at most one for each file. Default: one for each core."
        ),
    ] = None,
    train_tokenizer: Annotated[
        bool,
        typer.Option(
            "--train-tokenizer",
            help="First train a byte-level BPE on the input and write it to --tokenizer "
            "(default: tokenizer.json next to PREFIX).",
        ),
    ] = False,
    vocab_size: Annotated[int | None, typer.Option(help="Number of ids of the tokenizer to train.")] = None,
    append_eod: Annotated[bool, typer.Option(help="End each document with the end-of-document id.")] = True,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count malformed lines instead of stopping at the first.")
    ] = False,
    max_tokens: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Keep a random part of the documents with at most this many, such as 10B."),
    ] = None,
    memory_mib: Annotated[int, typer.Option(help="Approximate memory limit of the shuffle.")] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files at PREFIX.")] = False,
) -> None:
    """Turn text in JSONL or Parquet files into training data: tokenize, shuffle, and write Megatron .bin/.idx files.

    Safe to interrupt: run the same command again to continue.
    """
    from rich.console import Console

    from megatron_mtp.data.prepare.run import PrepareOptions
    from megatron_mtp.data.prepare.run import prepare as run

    if train_tokenizer != (vocab_size is not None):
        raise ConfigError("--train-tokenizer and --vocab-size belong together: give both, or neither.")
    options = PrepareOptions(
        tokenizer=tokenizer,
        shards=shards,
        shuffle=shuffle,
        json_key=json_key,
        append_eod=append_eod,
        skip_bad_lines=skip_bad_lines,
        train_vocab_size=vocab_size,
        memory_mib=memory_mib,
        max_tokens=None if max_tokens is None else _count(max_tokens),
    )
    console = Console(stderr=True, highlight=False)
    try:
        made = run(inputs, output, options, workers=workers, overwrite=overwrite, show_progress=console.is_terminal)
    except KeyboardInterrupt:
        console.print(f"Stopped. Finished work is kept in {output}.prepare: run the same command again to continue.")
        raise typer.Exit(130) from None
    _report(made)


def _count(text: str) -> int:
    try:
        return parse_quantity(text)
    except ConfigError as error:
        raise ConfigError(replace(error.problems[0], fields=("--max-tokens",))) from None


def _report(made: Prepared) -> None:
    counts = made.counts
    if made.was_done:
        typer.echo("Nothing to do: an earlier run made the same data.")
    typer.echo(
        f"{counts.documents:,} documents, {counts.tokens:,} tokens, largest id {counts.largest_id} of {made.vocab_size}"
    )
    if counts.empty:
        typer.echo(f"{counts.empty:,} empty documents left out")
    if counts.skipped:
        typer.echo(f"{counts.skipped:,} malformed lines skipped, the first: {counts.first_skipped}")
    typer.echo(f"tokenizer: {made.tokenizer}")
    for prefix in made.prefixes:
        typer.echo(prefix)
