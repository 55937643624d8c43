"""Tokenizing text: `prepare` against the tokenizer library alone and a plain writer with processes.

    python -m benchmarks.prepare      # 48 MB of Python source in 4 files; about five minutes on two cores

Sides: `prepare` with all it does (reading JSONL, tokenizing, shuffling off, writing .bin/.idx and the hash);
the tokenizer library's `encode_batch` on texts in memory, on all cores, which writes nothing; and a plain writer, which
gives one document at a time to a pool of processes and appends the ids to a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import in_turn, machine, parser, write_results
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl

_tokenizer = None


def corpus(folder: Path, megabytes: int, num_files: int) -> list[Path]:
    """JSONL files of that much text in total; the library's source is repeated with a number in each document."""
    texts = [json.loads(line)["text"] for line in stdlib_jsonl(folder / "source")[0].open()]
    paths = [folder / f"part_{index}.jsonl" for index in range(num_files)]
    files = [path.open("w") for path in paths]
    size, number = 0, 0
    while size < megabytes * 1_000_000:
        text = f"# {number}\n{texts[number % len(texts)]}"
        files[number % num_files].write(json.dumps({"text": text}) + "\n")
        size, number = size + len(text.encode()), number + 1
    for file in files:
        file.close()
    return paths


def texts_of(paths: list[Path]) -> Iterator[str]:
    """The text of each line."""
    for path in paths:
        with path.open() as file:
            for line in file:
                yield json.loads(line)["text"]


def sides(folder: Path, paths: list[Path], tokenizer: Path, workers: int) -> dict[str, Callable[[], object]]:
    """Name -> one run over all text."""
    from tokenizers import Tokenizer

    library, texts = Tokenizer.from_file(str(tokenizer)), list(texts_of(paths))

    def ours() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        prepare(paths, folder / "out" / "text", PrepareOptions(tokenizer=str(tokenizer)), workers=workers)

    def alone() -> None:
        for first in range(0, len(texts), 256):
            library.encode_batch_fast(texts[first : first + 256])

    def plain() -> None:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, _open, (str(tokenizer),)) as pool, (folder / "plain.bin").open("wb") as file:
            for ids in pool.imap(_encode, texts_of(paths), chunksize=1):
                file.write(ids)

    return {"prepare": ours, "library alone": alone, "plain writer": plain}


def _open(path: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_file(path)


def _encode(text: str) -> bytes:
    assert _tokenizer is not None
    return np.asarray(_tokenizer.encode(text).ids, np.uint16).tobytes()


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        folder = Path(name)
        paths = corpus(folder, options.megabytes, options.files)
        size = sum(len(text.encode()) for text in texts_of(paths)) / 1e6
        tokenizer = folder / "tokenizer.json"
        train_bpe(texts_of(paths[:1]), 8192, tokenizer)
        timings = in_turn(sides(folder, paths, tokenizer, options.threads), options.rounds)
    print(f"{size:.1f} MB of text in {options.files} files, {options.threads} processes or threads")
    for side, timing in timings.items():
        share = timings["library alone"].median / timing.median
        print(f"{side:<14} {timing!s:<26} s, {size / timing.median:6.2f} MB/s, {share:6.1%} of the library's speed")
    write_results("prepare", options, described, {"megabytes": size, "timings": timings})


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--megabytes", type=int, default=48)
    made.add_argument("--files", type=int, default=4)
    return made.parse_args()


if __name__ == "__main__":
    main()
