"""The work of `megatron-mtp generate`: loads a model, continues prompts, prints."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

import torch.distributed as dist

from megatron_mtp.data.tokenizer import Tokenizer
from megatron_mtp.decode.options import Options
from megatron_mtp.decode.sampling import Sampling
from megatron_mtp.decode.speculate import Generation, generate
from megatron_mtp.drafting.decoder import LoadedModel, open_decoder


def run(
    source: Path,
    texts: list[str],
    ids: list[list[int]],
    options: dict[str, Any],
    *,
    stream: bool = False,
    json: bool = False,
    dtype: str = "fp32",
    device: Literal["cpu", "cuda"] | None = None,
    tokenizer: str | None = None,
    ignore_end: bool = False,
    draft_vocab: int | None = None,
) -> Generation:
    """Continues texts and rows of token ids in one batch; rank 0 prints.

    Args:
        options: fields of decode.options.Options, with the fields of Sampling under "sampling".
    """
    sampling = Sampling(**options.pop("sampling"))
    with open_decoder(source, dtype=dtype, device=device, tokenizer=tokenizer, draft_vocab=draft_vocab) as loaded:
        prompts = [*(loaded.encode(text) for text in texts), *ids]
        stop_ids = frozenset() if ignore_end else loaded.stop_ids
        is_first = dist.get_rank() == 0
        streamer = Streamer(loaded.tokenizer) if stream and is_first else None
        result = generate(loaded.decoder, prompts, Options(sampling=sampling, stop_ids=stop_ids, **options), streamer)
        if is_first:
            _print(loaded, texts, ids, result, json=json, is_streamed=stream)
    return result


class Streamer:
    """Prints the text of one row token by token; an incomplete character waits for the next token."""

    def __init__(self, tokenizer: Tokenizer | None, out: TextIO | None = None):
        self.tokenizer, self.out = tokenizer, out or sys.stdout
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.ids.extend(tokens)
        text = " ".join(map(str, self.ids)) + " " if self.tokenizer is None else self.tokenizer.decode(self.ids)
        if text.startswith(self.printed) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.out.write(text[len(self.printed) :])
            self.out.flush()
            self.printed = text


def summary(result: Generation) -> dict[str, Any]:
    """Counts and speeds as JSON values."""
    counts = result.counts
    return {
        "rounds": counts.rounds,
        "new_tokens": sum(map(len, result.tokens)),
        "tokens_per_pass": counts.tokens_per_pass,
        "proposed": counts.proposed,
        "accepted": counts.accepted,
        "acceptance": [None if rate != rate else rate for rate in counts.acceptance],
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "tokens_per_s": None if result.tokens_per_s != result.tokens_per_s else result.tokens_per_s,
    }


def _print(
    loaded: LoadedModel, texts: list[str], ids: list[list[int]], result: Generation, *, json: bool, is_streamed: bool
) -> None:
    show = (lambda row: " ".join(map(str, row))) if loaded.tokenizer is None else loaded.tokenizer.decode
    if json:
        rows = [{"tokens": row, "text": None if loaded.tokenizer is None else show(row)} for row in result.tokens]
        print(json_format.dumps({"rows": rows} | summary(result), indent=2))
        return
    if is_streamed:
        print()
    else:
        for prompt, row in zip([*texts, *(" ".join(map(str, given)) for given in ids)], result.tokens, strict=True):
            print(prompt + ("" if texts else " | ") + show(row))
    counts = result.counts
    drafts = f", {counts.tokens_per_pass:.2f} tokens per pass of the main model" if counts.proposed else ""
    print(f"{sum(map(len, result.tokens))} tokens, {result.tokens_per_s:.1f} tokens/s{drafts}", file=sys.stderr)
