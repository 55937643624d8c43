"""`megatron-mtp spec-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mtp.cli.generate import NumDraft, Source, parse_num_draft
from megatron_mtp.errors import ConfigError


def spec_eval(
    source: Source,
    data: Annotated[
        list[str], typer.Option(help="Held-out .jsonl or text files, one for each domain; may be given several times.")
    ],
    num_draft: NumDraft = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="Documents of each domain.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Leading tokens of a document that are its prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded after each prompt.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture there (.png or .svg).")] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(min=2, help="Draft the lowest ids only, so many. Default: all. Verification knows all."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: what is there.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: all cores.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer in place of the model's.")] = None,
) -> None:
    """Measure what drafting with the MTP layers gains on held-out text: acceptance, passes saved, tokens per second."""
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype {dtype}: must be fp32 or bf16.")
    drafts = parse_num_draft(num_draft)
    from megatron_mtp.observe.logs import silence_noise

    silence_noise()
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
