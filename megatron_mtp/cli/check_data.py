"""`megatron-mtp check-data`: looks for damage in prepared data."""

from __future__ import annotations

import re
from typing import Annotated

import typer


def check_data(
    prefixes: Annotated[
        list[str], typer.Argument(metavar="PREFIX...", help="Data sets as in dataset.blend; endings are ignored.")
    ],
) -> None:
    """Compare .bin and .idx files with the checksums that `prepare` recorded. Reads all of them."""
    from megatron_mtp.data.check import check_files
    from megatron_mtp.errors import DataError

    problems = []
    for prefix in dict.fromkeys(re.sub(r"\.(bin|idx|json)$", "", prefix) for prefix in prefixes):
        try:
            found = check_files(prefix)
        except DataError as error:
            problems.append(str(error))
            continue
        outcome = "checksums match" if found.has_checksums else "index and sizes fit; no checksums were recorded"
        typer.echo(f"{prefix}: {found.num_documents:,} documents, {found.num_tokens:,} tokens, {outcome}")
    if problems:
        raise DataError("\n".join(problems))
