"""`megatron-mtp spec-eval`: measures the gain of drafting with the MTP layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mtp.cli.addresses import accepts_addresses
from megatron_mtp.cli.generate import Device, DraftVocab, Dtype, NumDraft, Source, TokenizerPath, parse_num_draft


@accepts_addresses("source")
def spec_eval(
    source: Source,
    data: Annotated[list[str], typer.Option(help="Held-out .jsonl or text file, one per domain; repeatable.")],
    num_draft: NumDraft = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="Documents per domain.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Leading tokens of a document to use as its prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after each prompt.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Write all results to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw acceptance and speed-up to this .png or .svg file.")] = None,
    draft_vocab: DraftVocab = None,
    dtype: Dtype = "fp32",
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    tokenizer: TokenizerPath = None,
) -> None:
    """Measure what drafting with the MTP layers gains on held-out text: acceptance, passes saved, tokens per second."""
    drafts = parse_num_draft(num_draft)
    from rich.console import Console

    from megatron_mtp.drafting import spec_eval as tool
    from megatron_mtp.drafting.decoder import open_decoder

    options = tool.SpecEvalOptions(
        num_draft=drafts, num_prompts=prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    with open_decoder(
        source, dtype=dtype, device=device, threads=threads, tokenizer=tokenizer, draft_vocab=draft_vocab
    ) as loaded:
        domains = tool.read_domains(data, loaded.encode, prompts)
        with Console(stderr=True).status("decoding"):
            results = tool.evaluate_domains(loaded.decoder, domains, options)
    tool.print_results(results, Console())
    if json is not None:
        json.write_text(
            tool.as_json(results, source=str(source), num_draft=drafts, draft_vocab=draft_vocab, dtype=dtype) + "\n"
        )
    if plot is not None:
        tool.plot(results, plot)
