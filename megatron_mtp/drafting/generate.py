"""The work of `megatron-mtp generate`: loads a model, continues prompts, prints."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any, Literal, TextIO

import torch.distributed as dist

from megatron_mtp.data.tokenizer import Tokenizer
from megatron_mtp.decode.options import Options
from megatron_mtp.decode.sampling import Sampling
from megatron_mtp.decode.speculate import Generation, generate
from megatron_mtp.drafting.decoder import LoadedModel, open_decoder
from megatron_mtp.drafting.requests import Request, StopText, answer_text, shown


def run(
    source: Path,
    requests: list[Request],
    options: dict[str, Any],
    *,
    chat: bool = False,
    plain: bool = False,
    stop: Sequence[str] = (),
    batch: int = 32,
    out: Path | None = None,
    stream: bool = False,
    json: bool = False,
    dtype: str = "fp32",
    device: Literal["cpu", "cuda"] | None = None,
    tokenizer: str | None = None,
    ignore_end: bool = False,
    draft_vocab: int | None = None,
) -> Generation:
    """Continues requests in batches; rank 0 prints.

    Args:
        options: fields of decode.options.Options, with the fields of Sampling under "sampling".
        chat, plain: as `LoadedModel.encode_request`.
        stop: strings that end an answer.
        batch: most requests in a batch.
        out: .jsonl file to write: each request with its answer.
    """
    sampling = Sampling(**options.pop("sampling"))
    with open_decoder(source, dtype=dtype, device=device, tokenizer=tokenizer, draft_vocab=draft_vocab) as loaded:
        prompts = [loaded.encode_request(request, chat=chat, plain=plain) for request in requests]
        stop_text = StopText(loaded.decode, list(stop)) if stop else None
        ends = frozenset() if ignore_end else loaded.stop_ids
        decoding = Options(sampling=sampling, stop_ids=ends, is_end=stop_text, **options)
        is_first = dist.get_rank() == 0
        streamer = Streamer(loaded.tokenizer, ends=ends, stop=stop_text) if stream and is_first else None
        result: Generation | None = None
        for rows in batched(prompts, batch):
            part = generate(loaded.decoder, rows, decoding, streamer)
            if result is None:
                result = part
            else:
                result.add(part)
        assert result is not None, "there is a request"
        if is_first:
            answers = _answers(loaded, result, ends, stop_text)
            if streamer is not None:
                streamer.close()
            _print(requests, answers, result, out=out, json=json, is_streamed=stream)
    return result


def _answers(
    loaded: LoadedModel, result: Generation, ends: frozenset[int], stop: StopText | None
) -> list[dict[str, Any]]:
    tokenizer = loaded.tokenizer
    return [
        {
            "tokens": tokens,
            "text": None if tokenizer is None else answer_text(tokenizer, tokens, ends, stop),
            "finish_reason": "stop" if is_ended else "length",
        }
        for tokens, is_ended in zip(result.tokens, result.is_ended, strict=True)
    ]


class Streamer:
    """Prints the text of one row token by token; an incomplete character waits for the next token.

    Args:
        ends: end tokens, which are not printed.
        stop: its strings, and what may become one of them, are not printed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        out: TextIO | None = None,
        *,
        ends: frozenset[int] = frozenset(),
        stop: StopText | None = None,
    ):
        self.tokenizer, self.out, self.ends, self.stop = tokenizer, out or sys.stdout, ends, stop
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.ids.extend(tokens)
        self._write(is_last=False)

    def close(self) -> None:
        """Prints what was held back."""
        self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        if self.tokenizer is None:
            text = " ".join(map(str, self.ids)) + " "
        else:
            text = answer_text(self.tokenizer, self.ids, self.ends, self.stop)
            if self.stop is not None and not is_last:
                text = text[: max(len(text) - self.stop.held_back, 0)]
        is_whole = is_last or not text.endswith("\N{REPLACEMENT CHARACTER}")
        if text.startswith(self.printed) and is_whole:
            self.out.write(text[len(self.printed) :])
            self.out.flush()
            self.printed = text


def summary(result: Generation) -> dict[str, Any]:
    """Counts and speeds as JSON values; docs/decoding.md defines each."""
    counts, rate = result.counts, result.tokens_per_s
    return {
        "new_tokens": sum(map(len, result.tokens)),
        "tokens_after_prefill": counts.new_tokens,
        "rounds": counts.rounds,
        "tokens_per_pass": counts.new_tokens / counts.rounds if counts.rounds else None,
        "proposed": counts.proposed,
        "accepted": counts.accepted,
        "acceptance": [None if rate != rate else rate for rate in counts.acceptance],
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "tokens_per_s": None if rate != rate else rate,
    }


def _print(
    requests: list[Request],
    answers: list[dict[str, Any]],
    result: Generation,
    *,
    out: Path | None,
    json: bool,
    is_streamed: bool,
) -> None:
    if out is not None:
        rows = (request | answer for request, answer in zip(requests, answers, strict=True))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json_format.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if json:
        print(json_format.dumps({"rows": answers} | summary(result), indent=2))
        return
    if is_streamed:
        print()
    elif out is None:
        for request, answer in zip(requests, answers, strict=True):
            text = " ".join(map(str, answer["tokens"])) if answer["text"] is None else answer["text"]
            print(shown(request) + ("" if "prompt" in request else " | " if "ids" in request else "assistant: ") + text)
    counts = result.counts
    drafts = f", {counts.tokens_per_pass:.2f} tokens per pass of the main model" if counts.proposed else ""
    print(f"{sum(map(len, result.tokens))} tokens, {result.tokens_per_s:.1f} tokens/s{drafts}", file=sys.stderr)
