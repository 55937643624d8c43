"""Trains a tokenizer on the texts of JSONL files, for `prepare` and by itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from megatron_mtp.data.prepare.bpe import VOCAB_SIZES, train_bpe
from megatron_mtp.data.prepare.jsonl import list_inputs, read_documents, text_bytes
from megatron_mtp.data.prepare.work_folder import writing
from megatron_mtp.data.randomness import derive_key, uniform
from megatron_mtp.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mtp.errors import ConfigError, DataError, Problem

TRAIN_BYTES = 200_000_000
"""Text that a tokenizer is trained on, about; it is sampled from all of the input."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    target: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    skip_bad_lines: bool = False,
    train_bytes: int = TRAIN_BYTES,
    overwrite: bool = False,
    on_document: Callable[[], None] = lambda: None,
) -> Tokenizer:
    """Trains the byte-level BPE that `prepare` would train on these inputs, and writes it to `target`.

    Args:
        inputs: JSONL files (plain, .gz, .zst) and folders of them; `target` itself is not read.
        vocab_size: number of ids; the result has fewer if the texts allow fewer merges.
        on_document: called for each text that is trained on.

    Raises:
        DataError: an input is missing or damaged, no line holds a text, or the target exists or cannot be written.
        ConfigError: an option is out of range.
    """
    low, high = VOCAB_SIZES
    problems = []
    if not low <= vocab_size <= high:
        rule = f"must be from {low:,} to {high:,}"
        problems.append(Problem(fields=("--vocab-size",), value=vocab_size, rule=rule))
    if target.suffix != ".json":
        problems.append(Problem(fields=("--output",), value=str(target), rule="must end in .json"))
    if problems:
        raise ConfigError(problems)
    files = [file for file in list_inputs(inputs) if file.resolve() != target.resolve()]
    check_target("--output", target, overwrite=overwrite)
    with writing("--output", target):
        train_on(files, target, vocab_size, json_key, skip_bad_lines, train_bytes, on_document)
    return open_tokenizer("huggingface", str(target))


def check_target(option: str, target: Path, *, overwrite: bool) -> None:
    """Refuses a file that exists or cannot be written now, not after hours of work. Makes its folder.

    Raises:
        DataError: as it says.
    """
    if target.is_file() and not overwrite:
        raise DataError(f"{option} {target}: exists. Use it as it is, choose another {option}, or pass --overwrite.")
    with writing(option, target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=target.parent):
            pass


def train_on(
    files: Sequence[Path],
    target: Path,
    vocab_size: int,
    json_key: str,
    skip_bad_lines: bool,
    train_bytes: int,
    on_document: Callable[[], None] = lambda: None,
) -> None:
    """Trains on about `train_bytes` of the texts of these files.

    Raises:
        DataError: no line holds a text, or a file cannot be read.
    """
    share = min(1.0, train_bytes / max(1, sum(map(text_bytes, files))))
    texts = _some_texts(files, json_key, skip_bad_lines, share)
    first = next(texts, None)
    if first is None:
        raise DataError(f"{', '.join(map(str, files))}: no line holds a text to train a tokenizer on.")

    def counted() -> Iterator[str]:
        for text in chain([first], texts):
            on_document()
            yield text

    train_bpe(counted(), vocab_size, target)


def _some_texts(files: Sequence[Path], json_key: str, skip_bad_lines: bool, share: float) -> Iterator[str]:
    """A random `share` of the texts of all files, chosen by file and line number."""
    on_bad_line = (lambda _: None) if skip_bad_lines else None
    for number, file in enumerate(files):
        key = derive_key("train tokenizer", number)
        for document in read_documents(file, json_key, on_bad_line):
            if share == 1.0 or uniform(np.array([document.line]), key)[0] < share:
                yield document.text
