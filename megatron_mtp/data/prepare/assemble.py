"""The second pass of `prepare`: assembles shards from the buckets of all spools, shuffled one bucket at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.data.prepare.budget import Budget, kept_part
from megatron_mtp.data.prepare.spool import Buckets, Spool, regroup
from megatron_mtp.data.sidecar import Sidecar


def assemble_shard(
    spools: Sequence[Spool],
    buckets: Buckets,
    chosen: Sequence[int],
    prefix: Path,
    dtype: np.dtype,
    template: Sidecar,
    on_progress: Callable[[int], None],
    budget: Budget | None = None,
) -> Sidecar:
    """Writes `<prefix>.bin`, `.idx` and, last, its sidecar `.json`.

    Args:
        chosen: buckets of this shard.
        template: the values that the sidecars of all shards share.
        on_progress: called with the number of tokens of each write.
        budget: which documents are kept; None: all.
    """
    writer, largest = IndexedWriter(str(prefix), dtype), -1
    for bucket in chosen:
        for tokens, lengths in _documents(spools, buckets, bucket, budget):
            writer.write(tokens, lengths)
            largest = max(largest, int(tokens.max()))
            on_progress(len(tokens))
    sidecar = template.of_files(writer, writer.close(), largest)
    sidecar.save(str(prefix))
    return sidecar


def _documents(
    spools: Sequence[Spool], buckets: Buckets, bucket: int, budget: Budget | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of a bucket: in parts, or at once if shuffled."""
    parts = _parts(spools, bucket, budget)
    if buckets.seed is None:
        yield from parts
        return
    if collected := list(parts):
        tokens, lengths = (np.concatenate(arrays) for arrays in zip(*collected, strict=True))
        del collected
        order = buckets.order(bucket, len(lengths))
        yield regroup(tokens, lengths, order), lengths[order]


def _parts(spools: Sequence[Spool], bucket: int, budget: Budget | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The kept documents of a bucket, run by run."""
    for number, spool in enumerate(spools):
        for tokens, lengths, first in spool.read(bucket):
            if budget is not None:
                tokens, lengths = kept_part(tokens, lengths, first, number, budget)
            if len(lengths):
                yield tokens, lengths
