"""`make demo`: a complete run, from real text to an evaluated model.

Text -> JSONL -> tokenizer -> .bin/.idx -> two ranks with two MTP depths on the last stage -> checkpoint -> a table that
compares the held-out loss of every depth with a bigram table at the same distance -> a report to open in a browser.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.examples.bigram import distance_bigram_loss, unigram_loss
from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.report.page import write_report

VOCAB_SIZE = 1024
console = Console()


@dataclass(frozen=True, slots=True)
class DemoData:
    """Prefixes of the training and the held-out data set, and their tokenizer."""

    train: str
    valid: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class DepthVerdict:
    """Loss of one depth on training and held-out text, and of both tables on the latter, in nats per token."""

    name: str
    train: float
    held_out: float
    bigram: float
    unigram: float

    @property
    def is_learnt(self) -> bool:
        """Whether the model learnt more than token pairs at this distance; False for NaN."""
        return self.held_out < self.bigram

    @property
    def knows_frequencies_only(self) -> bool:
        """Whether the model learnt how often each token occurs, and nothing else; False for NaN."""
        return abs(self.held_out - self.unigram) < 0.1


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every depth beats its bigram table and nearer depths are better, else 1."""
    options = _parse(argv)
    folder = Path(options.folder)
    console.rule("data: the source code of the Python standard library")
    data = make_data(folder / "data")
    source = shuffled_targets(data, folder / "control") if options.control else data
    run = _next_run(folder)
    console.rule("training")
    started_s = time.monotonic()
    command = train_command(source, run, options.overrides)
    console.print(f"$ python -m {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code:
        return code
    verdicts = judge(run / "metrics.jsonl", data)
    _print_summary(run, verdicts, time.monotonic() - started_s)
    return 0 if is_success(verdicts) else 1


def make_data(folder: Path) -> DemoData:
    """Prepares both data sets and the tokenizer."""
    train_jsonl, valid_jsonl = stdlib_jsonl(folder / "text")
    options = PrepareOptions(train_vocab_size=VOCAB_SIZE, shuffle=1)
    train = prepare([train_jsonl], folder / "train", options, overwrite=True, show_progress=True)
    valid = prepare([valid_jsonl], folder / "valid", PrepareOptions(tokenizer=train.tokenizer), overwrite=True)
    console.print(
        f"{train.counts.documents} files, {train.counts.tokens:,} tokens to train on; {valid.counts.documents} files, "
        f"{valid.counts.tokens:,} tokens held out; {train.vocab_size} token ids"
    )
    return DemoData(train.prefixes[0], valid.prefixes[0], train.tokenizer)


def shuffled_targets(data: DemoData, folder: Path) -> DemoData:
    """The control: the training tokens in random order, so that tokens cannot be predicted from earlier ones.

    A model trained on it can learn how often each token occurs and nothing else, so it must end at the unigram table's
    loss and fail the check at every depth; otherwise the check is wrong.
    """
    reader = IndexedReader(data.train)
    documents = [reader.read(index) for index in range(len(reader))]
    tokens = np.random.default_rng(0).permutation(np.concatenate(documents))
    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder / "shuffled_text_document")
    writer = IndexedWriter(prefix, tokens.dtype)
    writer.write(tokens, np.array([len(document) for document in documents]))
    writer.close()
    return DemoData(prefix, data.valid, data.tokenizer)


def train_command(data: DemoData, run: Path, overrides: list[str]) -> list[str]:
    """The command line of the training, after `python -m`."""
    ranks = _num_ranks()
    fields = {
        "dataset.blend": "null",
        "dataset.mock": "false",
        "dataset.blend_per_split": f"[[{data.train}],[{data.valid}],null]",
        "dataset.split": "null",
        "dataset.path_to_cache": run.parent / "data" / "cache",
        "tokenizer.tokenizer_type": "huggingface",
        "tokenizer.tokenizer_model": data.tokenizer,
        "model.vocab_size": VOCAB_SIZE,
        "checkpoint.save": run / "checkpoints",
        "logger.log_dir": run,
        "logger.tensorboard_dir": run / "tensorboard",
    }
    if ranks == 1:
        fields |= {"model.pipeline_model_parallel_size": 1, "model.pipeline_model_parallel_layout": "auto"}
    launch = ["--nproc", str(ranks)] if ranks > 1 else []
    return ["megatron_mtp", "pretrain", "demo", *launch, *(f"{k}={v}" for k, v in fields.items()), *overrides]


def judge(metrics: Path, data: DemoData) -> list[DepthVerdict]:
    """Compares the last evaluation with the bigram table of each distance and with the unigram table."""
    steps, evaluation = read_metrics(metrics)[-20:], read_metrics(metrics, "evaluation", "validation")[-1]
    unigram = unigram_loss(data.train, data.valid, VOCAB_SIZE)
    names = ["lm loss", *sorted(name for name in evaluation if re.fullmatch(r"mtp_\d loss", name))]
    return [
        DepthVerdict(
            name,
            sum(step[name] for step in steps) / len(steps),
            evaluation[name],
            distance_bigram_loss(data.train, data.valid, distance, VOCAB_SIZE),
            unigram,
        )
        for distance, name in enumerate(names, start=1)
    ]


def is_success(verdicts: list[DepthVerdict]) -> bool:
    """Whether every depth beats its table and farther tokens are harder."""
    losses = [verdict.held_out for verdict in verdicts]
    return all(verdict.is_learnt for verdict in verdicts) and all(near < far for near, far in pairwise(losses))


def _print_summary(run: Path, verdicts: list[DepthVerdict], seconds: float) -> None:
    table = Table(title="Loss of every prediction depth, nats per token (tables: held out)")
    for heading in ("depth", "training", "held out", "bigram table", "unigram table", "learnt more than pairs"):
        table.add_column(heading, justify="left" if heading == "depth" else "right")
    for v in verdicts:
        losses = (v.train, v.held_out, v.bigram, v.unigram)
        table.add_row(v.name, *(f"{loss:.3f}" for loss in losses), "yes" if v.is_learnt else "NO")
    console.print(table)
    last: dict[str, Any] = read_metrics(run / "metrics.jsonl")[-1]
    evaluation = read_metrics(run / "metrics.jsonl", "evaluation", "validation")[-1]
    page = write_report([run], run / "report")[0]
    console.print(
        f"training took {seconds:.0f} s, {last['perf/tokens_per_s_per_device'] * _num_ranks():,.0f} tokens/s in total. "
        f"As drafters, the MTP layers would have {evaluation['mtp/accepted_length']:.2f} tokens accepted per step "
        "(held out, teacher-forced).",
    )
    console.print(f"{run}: metrics.jsonl, tensorboard/, checkpoints/", highlight=False)
    console.print(f"{page}: open it in a browser", soft_wrap=True, highlight=False)
    console.print(
        "Next: megatron-mtp recipes; megatron-mtp show deepseek_v3; your own text through megatron-mtp prepare; "
        "docs/getting_started.md",
        highlight=False,
    )


def _num_ranks() -> int:
    """One on a single GPU, else two."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


def _next_run(folder: Path) -> Path:
    """A new directory, so that no run is continued by accident."""
    number = 1
    while (run := folder / f"run_{number:03d}").exists():
        number += 1
    run.mkdir(parents=True)
    return run


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/demo", help="folder for data and runs")
    parser.add_argument("--control", action="store_true", help="train on shuffled tokens, which must fail the check")
    parser.add_argument("overrides", nargs="*", help="config changes: section.field=value")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
