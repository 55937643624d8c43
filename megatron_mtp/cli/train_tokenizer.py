"""`megatron-mtp train-tokenizer`: a tokenizer that several data sets share."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer


def train_tokenizer(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="JSONL files (plain, .gz, .zst) and folders of them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids; fewer if the text allows fewer merges.")],
    json_key: Annotated[str, typer.Option(help="Field of each line that holds the text.")] = "text",
    sample_mb: Annotated[
        int, typer.Option(min=1, max=10**6, help="Megabytes of text to train on, drawn from all of the input.")
    ] = 200,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip malformed lines instead of stopping at the first.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on JSONL text, without preparing data.

    It is the one that `prepare --train-tokenizer` trains on the same input. Pass it to `prepare --tokenizer` for each
    data set that shares it.
    """
    from rich.console import Console

    from megatron_mtp.data.prepare.train_tokenizer import train_tokenizer as train

    console, documents = Console(stderr=True, highlight=False), count(1)
    try:
        with console.status("reading") as status:

            def show() -> None:
                if (number := next(documents)) % 1000 == 0:
                    status.update(f"{number:,} documents read")

            made = train(
                inputs,
                output,
                vocab_size,
                json_key=json_key,
                skip_bad_lines=skip_bad_lines,
                train_bytes=sample_mb * 10**6,
                overwrite=overwrite,
                on_document=show,
            )
    except KeyboardInterrupt:
        console.print("Stopped. Nothing was written.")
        raise typer.Exit(130) from None
    typer.echo(f"{output}: {made.vocab_size:,} ids, documents end with id {made.eod}, {made.fingerprint()}")
