"""Text to training data: JSONL -> tokens -> Megatron `.bin/.idx`, shuffled in bounded memory, safe to interrupt.

There are two passes. The first tokenizes each input file into a spool and sorts its documents into buckets. The second
assembles each shard from its buckets and shuffles one bucket at a time. Everything is written to `<output>.prepare/`
and moved to its place at the end, the `.idx` last, so a data set that can be opened is complete. An interrupted run
continues if the inputs and options are the same; otherwise it starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_mtp.config.filled import filled
from megatron_mtp.data.files import write_atomically
from megatron_mtp.data.indexed import token_dtype
from megatron_mtp.data.prepare.assemble import assemble_shard
from megatron_mtp.data.prepare.bpe import VOCAB_SIZES
from megatron_mtp.data.prepare.budget import Budget
from megatron_mtp.data.prepare.jsonl import list_inputs, text_bytes
from megatron_mtp.data.prepare.spool import Buckets, Spool, SpoolCounts
from megatron_mtp.data.prepare.tokenize_files import TokenizeJob, spool_path, tokenize_files
from megatron_mtp.data.prepare.train_tokenizer import TRAIN_BYTES, check_target, train_on
from megatron_mtp.data.prepare.work_folder import remove_finished_work, work_folder, work_path, writing
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.data.tokenizer import Tokenizer, tokenizer_from_spec
from megatron_mtp.errors import ConfigError, DataError, Problem

_FORMAT = 1  # part of the plan: a change here discards the unfinished work of older versions
_RANGES = {
    "--shards": (1, 10_000),
    "--shuffle": (0, 2**63 - 1),
    "--memory-mib": (64, 2**24),
    "--max-tokens": (1, 2**63 - 1),
    "--vocab-size": VOCAB_SIZES,
}
_SHUFFLE_BYTES_PER_TOKEN = 32  # two copies of the tokens and two int64 indices while a bucket is shuffled


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """Options that determine the result.

    Attributes:
        tokenizer: "bytes", "null:VOCAB" or a path (see `tokenizer_from_spec`). With `train_vocab_size` it is the
            file to write, by default `tokenizer.json` next to the output.
        shards: number of data sets to spread the documents over.
        shuffle: seed of a global shuffle; None: keep the order of the input.
        json_key: field of each line that holds the text.
        append_eod: end each document with the tokenizer's end-of-document id.
        skip_bad_lines: skip and count malformed lines; otherwise the first is an error.
        train_vocab_size: train a byte-level BPE with this number of ids on the input first.
        train_bytes: approximate amount of text to train it on, sampled from all of the input.
        memory_mib: approximate memory limit of the shuffle.
        max_tokens: keep a random part of the documents with at most this many tokens; None: all of them.
    """

    tokenizer: str | None = None
    shards: int = 1
    shuffle: int | None = None
    json_key: str = "text"
    append_eod: bool = True
    skip_bad_lines: bool = False
    train_vocab_size: int | None = None
    train_bytes: int = TRAIN_BYTES
    memory_mib: int = 1024
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        values = {
            "--shards": self.shards,
            "--shuffle": self.shuffle,
            "--memory-mib": self.memory_mib,
            "--vocab-size": self.train_vocab_size,
            "--max-tokens": self.max_tokens,
        }
        problems = [
            Problem(fields=(option,), value=value, rule=f"must be from {low:,} to {high:,}")
            for option, (low, high) in _RANGES.items()
            if (value := values[option]) is not None and not low <= value <= high
        ]
        if self.tokenizer is None and self.train_vocab_size is None:
            remedy = "Name a tokenizer, 'bytes', or train one with --train-tokenizer."
            problems.append(Problem(fields=("--tokenizer",), rule="is missing", remedy=remedy))
        if self.train_vocab_size is not None and not (self.tokenizer or ".json").endswith(".json"):
            rule = "names the file that --train-tokenizer writes: must end in .json"
            problems.append(Problem(fields=("--tokenizer",), value=self.tokenizer, rule=rule))
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        prefixes: for dataset.blend.
        tokenizer: for tokenizer.tokenizer_model.
        counts: of all shards together.
        was_done: an earlier run made the same data, and this one did nothing.
    """

    prefixes: list[str]
    tokenizer: str
    vocab_size: int
    counts: SpoolCounts
    was_done: bool = False


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    options: PrepareOptions,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Prepared:
    """Turns JSONL files into `<output>_text_document.{bin,idx,json}`; with several shards `<output>_01_text_...`.

    The result depends only on the inputs and the options, not on the number of workers or on interruptions.

    Args:
        inputs: JSONL files (plain, .gz, .zst), Parquet and Arrow files, and folders of them.
        output: prefix; its folder is created.
        workers: number of processes that tokenize, at most one for each file; None: one for each core.
        overwrite: replace other data sets, and another tokenizer, at the output.

    Raises:
        DataError: an input is missing or damaged, a line is malformed, or the output exists or cannot be written.
        ConfigError: an option is out of range.
    """
    files, output = list_inputs(inputs), Path(output)
    prefixes = shard_prefixes(output, options)
    _check_output(output, prefixes)
    target = options.tokenizer or str(output.parent / "tokenizer.json")
    files = _without_own(files, output, [*(f"{prefix}.json" for prefix in prefixes), target])
    plan = _plan(files, options)
    if finished := _finished(prefixes, plan, target):
        remove_finished_work(output, plan)
        return finished
    if not overwrite:
        _refuse_other(prefixes, plan)
    with writing("--output", output), work_folder(output, plan) as work, _progress_bar(show_progress) as bar:
        spec = target
        if options.train_vocab_size is not None:
            spec = _trained_tokenizer(files, options, work, Path(target), overwrite)
        tokenizer = tokenizer_from_spec(spec)
        buckets = Buckets(_bucket_count(files, options, tokenizer), options.shuffle)
        job = TokenizeJob(spec, options.json_key, options.append_eod, options.skip_bad_lines, buckets, work)
        counts = tokenize_files(files, job, workers, _task(bar, "tokenize (bytes)", sum(_sizes(files))))
        if counts.documents == 0:
            raise DataError(f"{', '.join(map(str, inputs))}: no line holds a text. Nothing was written.")
        spools = [
            Spool(spool_path(work, number), token_dtype(tokenizer.vocab_size), buckets.count)
            for number in range(len(files))
        ]
        budget = None if options.max_tokens is None else Budget.of(spools, options.max_tokens)
        _refuse_empty_shards(spools, options, budget)
        template = _sidecar_template(tokenizer, options, plan, files)
        on_tokens = _task(bar, "write (tokens)", min(counts.tokens, options.max_tokens or counts.tokens))
        written = _assemble(work, spools, buckets, len(prefixes), template, on_tokens, budget)
        counts = replace(counts, documents=written.documents, tokens=written.tokens, largest_id=written.largest_id)
        if options.train_vocab_size is not None:
            is_beside = Path(target).parent.resolve() == output.parent.resolve()  # else perhaps another file system
            write_atomically(Path(target), Path(spec).read_bytes(), work if is_beside else None)
        _publish(work, prefixes, template)
    return Prepared(prefixes, target, tokenizer.vocab_size, counts)


def shard_prefixes(output: Path, options: PrepareOptions) -> list[str]:
    """Prefixes in Megatron's form: `out_text_document`, or `out_01_text_document`, `out_02_...` for several shards.

    A slash of the key, which a file name cannot hold, becomes "_".
    """
    key = options.json_key.replace("/", "_").replace("\0", "_")
    if options.shards == 1:
        return [f"{output}_{key}_document"]
    width = max(2, len(str(options.shards)))
    return [f"{output}_{shard:0{width}d}_{key}_document" for shard in range(1, options.shards + 1)]


def _check_output(output: Path, prefixes: Sequence[str]) -> None:
    """Refuses names that no file can have, before any work is done."""
    if output.name in ("", "..") or "\0" in str(output):
        rule = "must end in the name of the data sets, such as data/web"
        raise ConfigError(Problem(fields=("--output",), value=str(output), rule=rule))
    longest = Path(prefixes[-1])
    try:
        longest.with_name(f".{longest.name}.json.{os.getpid()}.tmp").lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        remedy = "Choose another folder or a shorter name."
        raise ConfigError(Problem(fields=("--output",), value=str(output), rule=rule, remedy=remedy)) from error


def _without_own(files: Sequence[Path], output: Path, own: Sequence[str]) -> list[Path]:
    """The inputs without what this or an earlier run wrote, for an output inside a folder of inputs."""
    work, names = work_path(output).resolve(), {Path(name).resolve() for name in own}
    return [file for file in files if not ({work, *names} & {resolved := file.resolve(), resolved.parent})]


def _plan(files: Sequence[Path], options: PrepareOptions) -> str:
    """A hash of everything that determines the result: equal plans continue or reuse each other's work."""
    values = asdict(options)
    if options.max_tokens is None:
        del values["max_tokens"]  # data of earlier releases has the same plan
    if options.train_vocab_size is None:
        values["tokenizer"] = tokenizer_from_spec(filled(options.tokenizer)).fingerprint()
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_FORMAT, values, states]).encode()).hexdigest()[:32]


def _finished(prefixes: Sequence[str], plan: str, tokenizer: str) -> Prepared | None:
    """The result of an earlier, finished run of the same plan."""
    counts = SpoolCounts()
    for prefix in prefixes:
        sidecar = Sidecar.load(prefix)
        if sidecar is None or sidecar.plan != plan or not Path(f"{prefix}.idx").exists():
            return None
        counts.add(SpoolCounts(sidecar.num_documents, sidecar.num_tokens, sidecar.largest_id))
    return Prepared(list(prefixes), tokenizer, filled(sidecar).vocab_size, counts, was_done=True)


def _refuse_other(prefixes: Sequence[str], plan: str) -> None:
    for prefix in prefixes:
        sidecar = Sidecar.load(prefix)
        if Path(f"{prefix}.idx").exists() and (sidecar is None or sidecar.plan != plan):
            raise DataError(
                f"{prefix}.idx: exists, from other inputs or options. Choose another --output, or pass --overwrite."
            )


def _refuse_empty_shards(spools: Sequence[Spool], options: PrepareOptions, budget: Budget | None) -> None:
    if budget is None:
        counts = sum(spool.count_documents() for spool in spools)
    else:
        counts = sum(budget.count_documents(spool, number) for number, spool in enumerate(spools))
    per_shard = np.reshape(counts, (options.shards, -1)).sum(axis=1)
    if not per_shard.all():
        rule = f"is too large for {per_shard.sum():,} documents: {np.sum(per_shard == 0):,} data sets would be empty"
        remedy = "Choose fewer" + ("." if options.shuffle is not None else ", or spread them evenly with --shuffle.")
        raise ConfigError(Problem(fields=("--shards",), value=options.shards, rule=rule, remedy=remedy))


def _trained_tokenizer(
    files: Sequence[Path], options: PrepareOptions, work: Path, target: Path, overwrite: bool
) -> str:
    """Path of the tokenizer in the work folder, which is trained unless an interrupted run has trained it."""
    path = work / "tokenizer.json"
    if not path.exists():
        check_target("--tokenizer", target, overwrite=overwrite)
        vocab_size = filled(options.train_vocab_size)
        train_on(files, path, vocab_size, options.json_key, options.skip_bad_lines, options.train_bytes)
    return str(path)


def _bucket_count(files: Sequence[Path], options: PrepareOptions, tokenizer: Tokenizer) -> int:
    """Number of buckets in all shards, such that one fits in memory; one for each shard without a shuffle."""
    if options.shuffle is None:
        return options.shards
    tokens = sum(map(text_bytes, files)) / (1 if tokenizer.kind == "bytes" else 2.5)
    room = options.memory_mib * 2**20 / _SHUFFLE_BYTES_PER_TOKEN
    return options.shards * max(1, -int(-tokens // (options.shards * room)))


def _sidecar_template(tokenizer: Tokenizer, options: PrepareOptions, plan: str, files: Sequence[Path]) -> Sidecar:
    return Sidecar(
        tokenizer_type=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=options.append_eod,
        num_documents=0,
        num_tokens=0,
        largest_id=-1,
        bin_bytes=0,
        idx_bytes=0,
        plan=plan,
        sources=[str(file) for file in files],
    )


def _assemble(
    work: Path,
    spools: Sequence[Spool],
    buckets: Buckets,
    shards: int,
    template: Sidecar,
    on_tokens: Callable[[int], None],
    budget: Budget | None,
) -> SpoolCounts:
    """Writes the shards that are not complete yet to the work folder. Returns the counts of all."""
    dtype, total = token_dtype(template.vocab_size), SpoolCounts()
    each = buckets.count // shards
    for shard in range(shards):
        prefix = _shard_path(work, shard)
        try:
            sidecar = Sidecar.load(str(prefix))
        except DataError:  # as after a power failure
            sidecar = None
        if sidecar is None:
            chosen = range(shard * each, (shard + 1) * each)
            sidecar = assemble_shard(spools, buckets, chosen, prefix, dtype, template, on_tokens, budget)
        else:
            on_tokens(sidecar.num_tokens)
        total.add(SpoolCounts(sidecar.num_documents, sidecar.num_tokens, sidecar.largest_id))
    return total


def _shard_path(work: Path, shard: int) -> Path:
    return work / f"shard_{shard:05d}"


def _publish(work: Path, prefixes: Sequence[str], template: Sidecar) -> None:
    """Moves the shards to their places. May be interrupted and repeated at any point.

    The `.idx` of another data set is removed first and the new one is moved last, so contents are never mixed.
    """
    for shard, prefix in enumerate(prefixes):
        source, existing = _shard_path(work, shard), Sidecar.load(prefix)
        if existing is None or existing.plan != template.plan:
            Path(f"{prefix}.idx").unlink(missing_ok=True)
        _move(Path(f"{source}.bin"), Path(f"{prefix}.bin"))
        filled(Sidecar.load(str(source))).save(prefix, work)
        _move(Path(f"{source}.idx"), Path(f"{prefix}.idx"))


def _move(source: Path, target: Path) -> None:
    if source.exists():  # otherwise an interrupted run has moved it
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target)


def _progress_bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not shown)


def _task(bar: Progress, name: str, total: int) -> Callable[[float], None]:
    """A callback that advances a new line of the progress bar."""
    return partial(bar.advance, bar.add_task(name, total=total))


def _sizes(files: Sequence[Path]) -> list[int]:
    return [file.stat().st_size for file in files]
