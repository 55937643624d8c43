"""`megatron-mtp generate`: continues text with a trained model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_mtp.cli.addresses import accepts_addresses
from megatron_mtp.drafting.requests import Request, read_requests
from megatron_mtp.errors import ConfigError, DataError

MAX_NEW_TOKENS = 128

Source = Annotated[
    Path, typer.Argument(help="Run directory, folder of one checkpoint, or Hugging Face folder.", show_default=False)
]
NumDraft = Annotated[
    str, typer.Option(help="Tokens the MTP layers draft per round: a number, 0 (no drafts), or auto (by measurement).")
]
DraftVocab = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Draft only the N lowest token ids; verification uses the full vocabulary. Default: all.",
    ),
]
Dtype = Annotated[Literal["fp32", "bf16"], typer.Option(help="Dtype of weights and caches.")]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Device to run on. Default: cuda if available.")]
TokenizerPath = Annotated[str | None, typer.Option(help="Tokenizer file or folder to use instead of the model's.")]


@accepts_addresses("source")
def generate(
    source: Source,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeatable.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose text is one prompt, or a .jsonl file: on each line an object with prompt, messages or ids."
        ),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids to continue, such as 12,7,305; repeatable.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, for the tokenizer's chat template.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Read names of special tokens in prompts as text, and add no BOS.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens to add to each prompt. Default: 128, or fewer where the context has no room.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this text; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Write each prompt with its answer to this .jsonl file, instead of printing.")
    ] = None,
    num_draft: NumDraft = "auto",
    tree: Annotated[
        str | None,
        typer.Option(help="Draft tree: candidates per depth, such as 3,1. For one prompt, decoded greedily."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample only from the most probable tokens that together reach this probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample only from the k most probable tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated; for one prompt.")] = False,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Continue after tokens that end an answer.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and continuation. Default: model.seq_length.")
    ] = None,
    draft_vocab: DraftVocab = None,
    dtype: Dtype = "fp32",
    device: Device = None,
    tokenizer: TokenizerPath = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Shard the model over this many processes of this machine.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print tokens, text and counts as JSON.")] = False,
) -> None:
    """Continue text with a trained model. MTP layers draft and the main model verifies: the same text, but faster."""
    requests = _requests(prompt or [], prompt_file, prompt_ids or [])
    _check_together(requests, stream=stream, prints=not json and out is None, chat=chat, plain=plain, stop=stop or [])
    options = {
        "max_new_tokens": MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        "shorten": max_new_tokens is None,
        "num_draft": parse_num_draft(num_draft),
        "widths": parse_widths(tree),
        "context": context,
        "sampling": {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
    }
    if nproc is not None and nproc > 1 and "RANK" not in os.environ:
        from megatron_mtp.launch.local import run_ranks

        raise typer.Exit(run_ranks([sys.executable, "-m", "megatron_mtp", *sys.argv[1:]], nproc))
    from megatron_mtp.drafting.generate import run

    run(
        source,
        requests,
        options,
        chat=chat,
        plain=plain,
        stop=stop or (),
        batch=batch,
        out=out,
        stream=stream,
        json=json,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        ignore_end=ignore_end,
        draft_vocab=draft_vocab,
    )


def _requests(prompts: list[str], file: Path | None, ids: list[str]) -> list[Request]:
    """What the three kinds of prompt options ask for.

    Raises:
        ConfigError, DataError: there is none, or one cannot be read.
    """
    requests: list[Request] = [{"prompt": text} for text in prompts]
    if file is not None:
        requests += read_requests(file) if file.suffix == ".jsonl" else [{"prompt": _read(file)}]
    requests += [{"ids": _parse_ids(text)} for text in ids]
    if not requests:
        raise ConfigError("There is no prompt. Give --prompt, --prompt-file or --prompt-ids.")
    return requests


def _check_together(
    requests: list[Request], *, stream: bool, prints: bool, chat: bool, plain: bool, stop: list[str]
) -> None:
    """Raises ConfigError for options that exclude each other."""
    if stream and (len(requests) > 1 or not prints):
        raise ConfigError("--stream: prints the text of one prompt. Give one prompt, and omit --json and --out.")
    if chat and plain:
        raise ConfigError("--chat and --plain: a chat template writes special tokens. Omit one of them.")
    if not all(stop):
        raise ConfigError("--stop: is empty, so it would end every answer at once. Give a text.")


def parse_num_draft(text: str) -> int | str:
    """ "auto" or a number.

    Raises:
        ConfigError: it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ConfigError(f"--num-draft {text}: must be a number of drafts (0: none) or auto.")
    return int(text)


def parse_widths(text: str | None) -> tuple[int, ...] | None:
    """ "3,1" -> (3, 1)."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--tree {text}: must be numbers of candidates, one per depth, such as 3,1.")
    return tuple(map(int, parts))


def _parse_ids(text: str) -> list[int]:
    parts = text.replace(" ", ",").split(",")
    try:
        return [int(part) for part in parts if part]
    except ValueError:
        raise ConfigError(f"--prompt-ids {text}: must be token ids, such as 12,7,305.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {path}: cannot be read as text ({error}).") from None
