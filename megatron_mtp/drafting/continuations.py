"""Writes a model's own continuations as training data for its drafter, which must predict what the model writes.

    python -m megatron_mtp.drafting.continuations runs/demo/run_001/checkpoints --data train.jsonl --out runs/self/train

Prompts are pieces of documents. Each prompt and its continuation become one document of a .bin/.idx data set. A second
data set is the loss mask (dataset.loss_mask_suffix=_loss_mask), in which prompts are not targets. Documents are padded
with end-of-document, not a target either, to prompt-tokens + new-tokens + 1 tokens: with model.seq_length set to that
and dataset.reset_attention_mask=true, every training sample is one document, exactly as the model wrote it.
Source: FastMTP, arXiv 2509.18362, section 3.2 (self-distilled data).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import batched, islice
from pathlib import Path

import numpy as np

from megatron_mtp.data.indexed import IndexedWriter, token_dtype
from megatron_mtp.decode.options import Options
from megatron_mtp.decode.sampling import Sampling
from megatron_mtp.decode.speculate import generate
from megatron_mtp.drafting.decoder import LoadedModel, open_decoder
from megatron_mtp.drafting.spec_eval import read_domains

MASK_SUFFIX = "_loss_mask"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parse(argv)
    with open_decoder(
        options.source, dtype=options.dtype, tokenizer=options.tokenizer, threads=options.threads
    ) as loaded:
        documents = read_domains([options.data], loaded.encode, options.documents)
        prompts = list(_prompts([ids for rows in documents.values() for ids in rows], options))
        started = time.monotonic()
        count = write(loaded, prompts, options)
    seconds = time.monotonic() - started
    print(
        f"{len(prompts)} documents, {count:,} tokens, {count / seconds:,.0f} tokens/s: {options.out}.bin",
        file=sys.stderr,
    )
    return 0


def write(loaded: LoadedModel, prompts: list[list[int]], options: argparse.Namespace) -> int:
    """Continues all prompts in batches and writes both data sets. Returns the number of tokens."""
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    text = IndexedWriter(options.out, token_dtype(loaded.decoder.vocab_size))
    mask = IndexedWriter(options.out + MASK_SUFFIX, np.dtype(np.uint8))
    decoding = Options(
        max_new_tokens=options.new_tokens,
        num_draft=0,  # a batch uses the machine fully; drafts pay for single rows
        sampling=Sampling(options.temperature, seed=options.seed),
        stop_ids=loaded.stop_ids,
    )
    count, width = 0, options.prompt_tokens + options.new_tokens + 1
    for batch in batched(prompts, options.batch):
        for prompt, row in zip(batch, generate(loaded.decoder, batch, decoding).tokens, strict=True):
            fill = [] if loaded.tokenizer is None else [loaded.tokenizer.eod] * (width - len(prompt) - len(row))
            ids = np.array([*prompt, *row, *fill])
            places = np.arange(len(ids))
            text.write(ids, np.array([len(ids)]))
            mask.write((places >= len(prompt)) & (places < len(prompt) + len(row)), np.array([len(ids)]))
            count += len(prompt) + len(row)
    text.close()
    mask.close()
    return count


def _prompts(documents: list[list[int]], options: argparse.Namespace) -> Iterator[list[int]]:
    """The first pieces of all documents, then the second ones, and so on, until there are enough."""
    size = options.prompt_tokens
    longest = max(map(len, documents), default=0)
    found = (
        ids[start : start + size] for start in range(0, longest, size) for ids in documents if len(ids) >= start + size
    )
    return islice(found, options.prompts)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run directory, checkpoint or Hugging Face folder")
    parser.add_argument("--data", required=True, help="text to take prompts from: .jsonl or a text file")
    parser.add_argument("--out", required=True, help="prefix of the data sets to write")
    parser.add_argument("--documents", type=int, default=200, help="documents to read")
    parser.add_argument("--prompts", type=int, default=512, help="continuations to write")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=192, help="most tokens of each continuation")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--batch", type=int, default=64, help="prompts decoded at once")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype of weights and caches")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--tokenizer", help="tokenizer to use instead of the model's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
