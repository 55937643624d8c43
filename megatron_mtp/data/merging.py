"""Joins data sets, and divides one by documents. Both read and write in one pass, a block at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_mtp.config.blend import SPLITS, parse_split
from megatron_mtp.data.corpus import split_range
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.errors import DataError

_BLOCK_DOCUMENTS, _BLOCK_TOKENS = 1 << 16, 1 << 24


@dataclass(frozen=True, slots=True)
class Written:
    """A data set that was written."""

    prefix: str
    num_documents: int
    num_tokens: int
    has_sidecar: bool


@dataclass(frozen=True, slots=True)
class _Source:
    reader: IndexedReader
    sidecar: Sidecar | None

    @property
    def made_by(self) -> tuple[object, ...] | None:
        """What must be equal in data sets that are joined; None: unknown."""
        sidecar = self.sidecar
        if sidecar is None:
            return None
        return sidecar.tokenizer_fingerprint, sidecar.vocab_size, sidecar.eod, sidecar.append_eod


def merge(out: str, prefixes: Sequence[str], *, overwrite: bool = False) -> Written:
    """Writes the documents of all prefixes to one, in the order given.

    Args:
        out: prefix of the result. It has a sidecar if the sources have.

    Raises:
        DataError: a source is damaged, they hold different types or come from different tokenizers, or `out` exists.
    """
    sources = [_open(prefix) for prefix in prefixes]
    first, problems = sources[0], []
    for source in sources[1:]:
        names = f"{source.reader.prefix} and {first.reader.prefix}"
        if source.reader.dtype != first.reader.dtype:
            problems.append(f"{names}: hold {source.reader.dtype} and {first.reader.dtype}. Merge data of one type.")
        elif source.made_by != first.made_by:
            ours, theirs = (_tokenizer(one) for one in (source, first))
            rule = "one tokenizer, with the same end of documents, must have made all of them"
            problems.append(f"{names}: come from {ours} and {theirs}; {rule}.")
    if problems:
        raise DataError("\n".join(problems))
    parts = [(source, 0, len(source.reader)) for source in sources]
    return _write(out, parts, f"merge of {len(prefixes)}", overwrite)


def split(prefix: str, shares: str, out: str, *, overwrite: bool = False) -> list[Written]:
    """Writes the documents of a prefix to `out`_train, _valid and _test, those that `dataset.split` would choose.

    Args:
        shares: as in dataset.split; a share of 0 is left out.

    Raises:
        DataError: the source is damaged, a share holds no document, or a result exists.
        ValueError: `shares` is no split.
    """
    source = _open(prefix)
    ranges = {which: split_range(shares, which, len(source.reader)) for which in SPLITS}
    wanted = {which: ranges[which] for which, share in zip(SPLITS, parse_split(shares), strict=True) if share}
    if empty := [which for which, (first, last) in wanted.items() if first >= last]:
        count = f"{len(source.reader):,} documents"
        raise DataError(f"--shares {shares}: leaves {' and '.join(empty)} none of the {count} of {prefix}.")
    for which in wanted:
        _refuse_existing(f"{out}_{which}", overwrite)
    return [
        _write(f"{out}_{which}", [(source, *documents)], f"split {shares} {which}", overwrite)
        for which, documents in wanted.items()
    ]


def _open(prefix: str) -> _Source:
    reader, sidecar = IndexedReader(prefix), Sidecar.load(prefix)
    problems = [] if sidecar is None else sidecar.mismatches(reader)
    if not reader.is_plain:
        rule = "groups sequences into documents, or marks modes, which would be lost"
        problems.append(f"{prefix}.idx: {rule}. Use Megatron-LM's tools/merge_datasets.py.")
    if problems:
        raise DataError("\n".join(problems))
    return _Source(reader, sidecar)


def _tokenizer(source: _Source) -> str:
    sidecar = source.sidecar
    if sidecar is None:
        return "an unknown tokenizer (no sidecar)"
    ends = f"end {sidecar.eod}" if sidecar.append_eod else "no end of documents"
    return f"{sidecar.tokenizer_fingerprint} ({ends})"


def _refuse_existing(prefix: str, overwrite: bool) -> None:
    if not overwrite and any(Path(f"{prefix}{ending}").exists() for ending in (".bin", ".idx", ".json")):
        raise DataError(f"{prefix}: exists. Choose another name, or pass --overwrite.")


def _write(out: str, parts: Sequence[tuple[_Source, int, int]], plan: str, overwrite: bool) -> Written:
    """Writes documents [first, last) of each source, one after the other."""
    _refuse_existing(out, overwrite)
    if taken := [source.reader.prefix for source, _, _ in parts if _is_same(source.reader.prefix, out)]:
        raise DataError(f"{out}: is a source itself ({taken[0]}). Choose another name.")
    sidecar, largest = parts[0][0].sidecar, -1
    with _published(out, has_sidecar=sidecar is not None) as temporary:
        writer = IndexedWriter(temporary, parts[0][0].reader.dtype)
        for source, first, last in parts:
            for tokens, lengths in _blocks(source.reader, first, last):
                writer.write(tokens, lengths)
                largest = max(largest, int(tokens.max()) if len(tokens) else -1)
        counts = writer.close()
        if sidecar is not None:
            plans = " ".join(source.sidecar.plan for source, _, _ in parts if source.sidecar)
            template = replace(
                sidecar,
                plan=hashlib.sha256(f"{plan} {plans}".encode()).hexdigest(),
                sources=[source.reader.prefix for source, _, _ in parts],
            )
            template.of_files(writer, counts, largest).save(temporary)
    return Written(out, *counts, has_sidecar=sidecar is not None)


def _blocks(reader: IndexedReader, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of the documents [first, last), about _BLOCK_TOKENS at a time."""
    for begin in range(first, last, _BLOCK_DOCUMENTS):
        lengths = reader.lengths(begin, min(begin + _BLOCK_DOCUMENTS, last))
        block = (np.cumsum(lengths, dtype=np.int64) - lengths) // _BLOCK_TOKENS
        for part in np.split(lengths, np.flatnonzero(np.diff(block)) + 1):
            yield reader.read(begin, 0, int(np.sum(part, dtype=np.int64))), part
            begin += len(part)


def _is_same(prefix: str, out: str) -> bool:
    return Path(f"{prefix}.bin").resolve() == Path(f"{out}.bin").resolve()


@contextmanager
def _published(out: str, *, has_sidecar: bool) -> Iterator[str]:
    """Yields a temporary prefix beside `out`, whose files replace those of `out` if the block succeeds.

    The old `.idx` is removed first and the new one is moved last, so a data set that opens is complete.
    """
    target = Path(out)
    temporary = str(target.with_name(f".{target.name}.{os.getpid()}.tmp"))
    endings = [".bin", *[".json"] * has_sidecar, ".idx"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for ending in endings:
            with Path(f"{temporary}{ending}").open("rb") as file:
                os.fsync(file.fileno())
        for ending in (".idx", ".json"):
            Path(f"{out}{ending}").unlink(missing_ok=True)
        for ending in endings:
            Path(f"{temporary}{ending}").replace(f"{out}{ending}")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Make room, or choose another place.") from error
    finally:
        for ending in (".bin", ".json", ".idx"):
            Path(f"{temporary}{ending}").unlink(missing_ok=True)
