"""The work of `megatron-mtp spec-eval`: measures what the MTP layers gain as drafters, by domain.

Each prompt is decoded greedily without and with drafts, one after the other in the same process, so both see the same
machine. The expected speed-up follows from the acceptance and the seconds of a plain step and of a round; if it is far
from the measured one, bookkeeping or noise is the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mtp.data.prepare.jsonl import list_inputs, read_documents
from megatron_mtp.decode.choice import expected_speed_up
from megatron_mtp.decode.measure import TextCounts, acceptance_on_text
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.options import Options
from megatron_mtp.decode.speculate import Counts, generate
from megatron_mtp.errors import DataError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecEvalOptions:
    """What to decode.

    Args:
        num_draft: K, drafts per round, or "auto".
        num_prompts: documents per domain.
        prompt_tokens: leading tokens of a document that are the prompt.
        new_tokens: tokens decoded after it.
        text_tokens: leading tokens of a document on which teacher-forced acceptance is counted.
    """

    num_draft: int | str = "auto"
    num_prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    text_tokens: int = 256


@dataclass(frozen=True, slots=True)
class DomainResult:
    """Metrics of one domain. Lists have one entry per depth; acceptance is conditional on the depths before.

    `acceptance_on_text` is teacher-forced on the documents, as in training evaluation; `acceptance` is that of
    decoding.
    """

    name: str
    num_prompts: int
    acceptance_on_text: list[float | None]
    acceptance: list[float | None]
    proposed: list[int]
    accepted: list[int]
    tokens_per_pass: float
    passes_saved: float
    """Share of plain decoding's passes of the main model that drafting saves."""
    plain_tokens_per_s: float
    tokens_per_s: float
    speed_up: float
    expected_speed_up: float
    draft_ms: float
    """Mean time per round spent on drafting."""
    verify_ms: float
    """Mean time per round spent in the main model."""
    plain_step_ms: float
    """Mean time per token without drafts."""
    num_equal: int
    """Prompts with the same tokens with and without drafts."""


def evaluate_domains(
    decoder: Decoder,
    domains: dict[str, list[list[int]]],
    options: SpecEvalOptions,
    on_prompt: Callable[[str], None] | None = None,
) -> list[DomainResult]:
    """Evaluates documents, given as token ids, by domain; with several domains also all together.

    Raises:
        DataError: no document of a domain is longer than the prompt, or the context does not hold it and the answer.
        UnsupportedError: the model has no MTP layers.
    """
    if not decoder.depths:
        raise UnsupportedError(
            "model.mtp_num_layers = 0: there is no drafter to evaluate. `megatron-mtp generate` decodes this model "
            "without drafts; the recipe mtp_finetune trains a drafter for it."
        )
    prompt, new, context = options.prompt_tokens, options.new_tokens, decoder.model.seq_length
    if prompt + new > context:
        raise DataError(
            f"--prompt-tokens {prompt} and --new-tokens {new}: together more than the model's context of {context} "
            "(model.seq_length). Choose smaller numbers."
        )
    measured = {name: _measure(decoder, name, documents, options, on_prompt) for name, documents in domains.items()}
    results = [_result(name, parts) for name, parts in measured.items()]
    if len(results) > 1:
        results.append(_result("all", [part for parts in measured.values() for part in parts]))
    return results


@dataclass(slots=True)
class _Measured:
    """Measurements of one prompt."""

    on_text: TextCounts
    counts: Counts
    plain_tokens: int
    plain_s: float
    draft_s: float
    verify_s: float
    decode_s: float
    is_equal: bool


def _measure(
    decoder: Decoder,
    name: str,
    documents: list[list[int]],
    options: SpecEvalOptions,
    on_prompt: Callable[[str], None] | None,
) -> list[_Measured]:
    usable = [ids for ids in documents if len(ids) > options.prompt_tokens][: options.num_prompts]
    if not usable:
        raise DataError(
            f"{name}: none of its {len(documents)} documents is longer than the prompt, which has "
            f"{options.prompt_tokens} tokens. Choose a smaller --prompt-tokens or other text."
        )
    plain = Options(max_new_tokens=options.new_tokens, num_draft=0)
    drafted = Options(max_new_tokens=options.new_tokens, num_draft=options.num_draft)
    depths = max(decoder.model.mtp_num_layers, options.num_draft if isinstance(options.num_draft, int) else 0)
    warm_up = [usable[0][: options.prompt_tokens]]
    for each in (plain, drafted):
        generate(decoder, warm_up, each)
    parts = []
    for ids in usable:
        prompt = [ids[: options.prompt_tokens]]
        without, with_drafts = generate(decoder, prompt, plain), generate(decoder, prompt, drafted)
        parts.append(
            _Measured(
                on_text=acceptance_on_text(decoder, ids[: options.text_tokens], depths),
                counts=with_drafts.counts,
                plain_tokens=without.counts.new_tokens,
                plain_s=without.decode_s,
                draft_s=with_drafts.draft_s,
                verify_s=with_drafts.verify_s,
                decode_s=with_drafts.decode_s,
                is_equal=without.tokens == with_drafts.tokens,
            )
        )
        if on_prompt is not None:
            on_prompt(name)
    return parts


def _result(name: str, parts: Sequence[_Measured]) -> DomainResult:
    on_text, counts = TextCounts(), Counts()
    for part in parts:
        on_text.add(part.on_text)
        counts.merge(part.counts)
    plain_tokens, plain_s = sum(part.plain_tokens for part in parts), sum(part.plain_s for part in parts)
    draft_s, verify_s, decode_s = (sum(getattr(p, n) for p in parts) for n in ("draft_s", "verify_s", "decode_s"))
    rounds, step_s = max(counts.rounds, 1), plain_s / max(plain_tokens, 1)
    known = [rate for rate in counts.acceptance if not math.isnan(rate)]
    return DomainResult(
        name=name,
        num_prompts=len(parts),
        acceptance_on_text=_json(on_text.acceptance),
        acceptance=_json(counts.acceptance),
        proposed=counts.proposed,
        accepted=counts.accepted,
        tokens_per_pass=counts.tokens_per_pass,
        passes_saved=1 - counts.rounds / max(counts.new_tokens, 1),
        plain_tokens_per_s=plain_tokens / plain_s,
        tokens_per_s=counts.new_tokens / decode_s,
        speed_up=counts.new_tokens / decode_s * step_s,
        expected_speed_up=expected_speed_up(known, step_s, (draft_s + verify_s) / rounds),
        draft_ms=1e3 * draft_s / rounds,
        verify_ms=1e3 * verify_s / rounds,
        plain_step_ms=1e3 * step_s,
        num_equal=sum(part.is_equal for part in parts),
    )


def _json(rates: list[float]) -> list[float | None]:
    return [None if math.isnan(rate) else rate for rate in rates]


def read_domains(
    inputs: Sequence[str | Path], encode: Callable[[str], list[int]], num_documents: int
) -> dict[str, list[list[int]]]:
    """Documents as token ids, by domain, which is the file's name.

    Args:
        inputs: .jsonl files (also compressed), folders of them, and text files, which are one document each.
        num_documents: four times as many documents of each file are read.

    Raises:
        DataError: an input does not exist or holds no text.
    """
    domains: dict[str, list[list[int]]] = {}
    for source in map(Path, inputs):
        files = list_inputs([source]) if source.is_dir() or ".jsonl" in source.name else [source]
        for file in files:
            texts = list(islice(_texts(file), 4 * num_documents))
            domains[file.name.split(".")[0]] = [encode(text) for text in texts if text]
    return domains


def _texts(file: Path) -> Iterator[str]:
    if ".jsonl" in file.name:
        yield from (document.text for document in read_documents(file))
        return
    try:
        yield file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {file}: cannot be read as text ({error}). Give .jsonl or text files.") from None


def print_results(results: list[DomainResult], console: Console) -> None:
    """Prints the table of all domains, 80 columns wide for three depths."""
    title = "The MTP layers as drafters: greedy decoding, batch 1"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.caption = (
        "text, decoded: acceptance of each depth, given the depths before, teacher-forced on the text and while "
        "decoding; per pass: tokens per pass of the main model; plain, drafts: tokens/s without and with drafts; same: "
        "prompts with equal tokens"
    )
    for heading in ("domain", "text", "decoded"):
        table.add_column(heading)
    for heading in ("per pass", "plain", "drafts", "speed-up", "expected", "same"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            r.name,
            _percent(r.acceptance_on_text),
            _percent(r.acceptance),
            f"{r.tokens_per_pass:.2f}",
            f"{r.plain_tokens_per_s:.1f}",
            f"{r.tokens_per_s:.1f}",
            f"{r.speed_up:.2f}",
            f"{r.expected_speed_up:.2f}",
            f"{r.num_equal}/{r.num_prompts}",
        )
    console.print(table)


def _percent(rates: list[float | None]) -> str:
    return " ".join("-" if rate is None else f"{100 * rate:.0f}%" for rate in rates)


def as_json(results: list[DomainResult], **facts: Any) -> str:
    """All results as one JSON document."""
    return json.dumps(facts | {"domains": [asdict(result) for result in results]}, indent=2)


def plot(results: list[DomainResult], picture: Path) -> Path:
    """Draws acceptance by depth, and measured next to expected speed-up, for each domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, r in enumerate(results):
        depths = range(1, len(r.acceptance) + 1)
        left.plot(depths, [math.nan if a is None else a for a in r.acceptance], "o-", color=f"C{index}", label=r.name)
        right.bar(index - 0.2, r.speed_up, 0.4, color=f"C{index}")
        right.bar(index + 0.2, r.expected_speed_up, 0.4, color=f"C{index}", alpha=0.4)
    left.set_xticks(range(1, 1 + max(len(r.acceptance) for r in results)))
    left.set(xlabel="depth", ylabel="accepted, given the depths before", ylim=(0, 1))
    left.legend(fontsize="small")
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set(ylabel="speed-up: measured, and (pale) expected", xticks=range(len(results)))
    right.set_xticklabels([r.name for r in results], rotation=20)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture
