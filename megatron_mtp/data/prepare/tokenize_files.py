"""The first pass of `prepare`: tokenizes each input file into a spool, several files at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mtp.data.indexed import token_dtype
from megatron_mtp.data.prepare.documents import Document
from megatron_mtp.data.prepare.jsonl import read_documents
from megatron_mtp.data.prepare.spool import Buckets, SpoolCounts, SpoolWriter, is_complete, read_counts
from megatron_mtp.data.tokenizer import Tokenizer, tokenizer_from_spec
from megatron_mtp.errors import DataError

_BATCH_CHARS = 4_000_000  # encoded at a time, so that the tokenizer can use several threads
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class TokenizeJob:
    """What to do with every input file.

    Attributes:
        tokenizer: for `tokenizer_from_spec`.
        work: folder of the spools.
    """

    tokenizer: str
    json_key: str
    append_eod: bool
    skip_bad_lines: bool
    buckets: Buckets
    work: Path


def spool_path(work: Path, number: int) -> Path:
    """Folder and name of the spool of input file `number`."""
    return work / f"input_{number:06d}"


def tokenize_files(
    files: Sequence[Path], job: TokenizeJob, workers: int | None, on_progress: Callable[[int], None]
) -> SpoolCounts:
    """Makes the spools that are not complete yet and returns the counts of all.

    Args:
        workers: number of processes, at most one for each file; None: one for each core. With one, the work is done in
            this process and the tokenizer's own threads use the cores.
        on_progress: called with the number of bytes of the inputs read since the last call.

    Raises:
        DataError: a file is damaged, a line is malformed, or a worker died.
    """
    missing = []
    for number, file in enumerate(files):
        if is_complete(spool_path(job.work, number)):
            on_progress(file.stat().st_size)
        else:
            missing.append((number, file))
    workers = min(workers or len(os.sched_getaffinity(0)), len(missing))
    if workers > 1:
        _in_processes(missing, job, workers, on_progress)
    else:
        tokenizer = tokenizer_from_spec(job.tokenizer)
        for number, file in missing:
            _tokenize(number, file, job, tokenizer, on_progress)
    total = SpoolCounts()
    for number in range(len(files)):
        total.add(read_counts(spool_path(job.work, number)))
    return total


def _tokenize(
    number: int, file: Path, job: TokenizeJob, tokenizer: Tokenizer, on_progress: Callable[[int], None]
) -> None:
    writer = SpoolWriter(spool_path(job.work, number), number, job.buckets, token_dtype(tokenizer.vocab_size))
    on_bad_line = writer.counts.skip if job.skip_bad_lines else None
    for batch in _batches(read_documents(file, job.json_key, on_bad_line, on_progress)):
        encoded = _encode(batch, tokenizer, file, on_bad_line)
        kept = [ids for ids in encoded if ids]
        writer.counts.empty += len(encoded) - len(kept)
        if job.append_eod:
            for ids in kept:
                ids.append(tokenizer.eod)
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        if len(kept):
            writer.add(np.fromiter(chain.from_iterable(kept), np.int64, int(lengths.sum())), lengths)
    writer.close()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Document], tokenizer: Tokenizer, file: Path, on_bad_line: Callable[[str], None] | None
) -> list[list[int]]:
    """Ids of each text. If one cannot be encoded, encodes them one by one, to name its line."""
    try:
        return tokenizer.encode_batch([document.text for document in batch])
    except ValueError:
        encoded = []
    for document in batch:
        try:
            encoded += tokenizer.encode_batch([document.text])
        except ValueError as error:
            problem = f"{file}:{document.line}: cannot be tokenized ({error})"
            if on_bad_line is None:
                raise DataError(f"{problem}. Fix the line, or pass --skip-bad-lines.") from error
            on_bad_line(problem)
    return encoded


class _StoppedError(Exception):
    """Another file failed, or the user stopped the run."""


def _in_processes(
    missing: Sequence[tuple[int, Path]], job: TokenizeJob, workers: int, on_progress: Callable[[int], None]
) -> None:
    """Runs `_tokenize` over files in new processes (fork would copy a tokenizer without its running threads)."""
    context = multiprocessing.get_context("spawn")
    read, stop = context.Value("q", 0), context.Event()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    reported = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (job, threads, read, stop)) as pool:
        futures = [pool.submit(_work, number, file) for number, file in missing]
        try:
            while not all(future.done() for future in futures):
                _raise_first_error(futures)
                time.sleep(_POLL_S)
                now = read.value
                on_progress(now - reported)
                reported = now
            _raise_first_error(futures)
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    on_progress(read.value - reported)


def _raise_first_error(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        error = future.exception() if future.done() else None
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "A worker process died, most likely because it ran out of memory. Run again with fewer --workers; "
                "finished files are kept."
            ) from error
        if error is not None:
            raise error


_worker: Any = None
"""(job, tokenizer, bytes read, stop) of this worker process, set when it starts."""


def _start_worker(job: TokenizeJob, threads: int, read: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees it and sets `stop`
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # for the tokenizers library, before its import
    global _worker
    _worker = (job, tokenizer_from_spec(job.tokenizer), read, stop)


def _die_with_parent() -> None:
    """Ends this worker if the parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)


def _work(number: int, file: Path) -> None:
    job, tokenizer, read, stop = _worker

    def on_progress(num_bytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with read.get_lock():
            read.value += num_bytes

    on_progress(0)
    _tokenize(number, file, job, tokenizer, on_progress)
