"""Checks a request before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from megatron_mtp.config.units import GIB
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.options import MAX_AUTO_DRAFTS, Options
from megatron_mtp.decode.session import slots_needed
from megatron_mtp.decode.tree import round_tokens
from megatron_mtp.errors import ConfigError, DataError, UnsupportedError


def check_request(decoder: Decoder, prompts: Sequence[Sequence[int]], options: Options) -> int:
    """Returns the largest number of drafts per round.

    Raises:
        ConfigError: invalid options.
        UnsupportedError: drafts from a model without MTP layers, more drafts than parallel heads, a draft tree for
            several rows or sampling.
        DataError: a prompt that is empty or too long, an unknown id, caches that do not fit in memory.
    """
    problems = []
    if options.max_new_tokens < 1:
        problems.append(f"max_new_tokens = {options.max_new_tokens}: must be at least 1.")
    is_number = isinstance(options.num_draft, int) and options.num_draft >= 0
    if not is_number and options.num_draft != "auto":
        problems.append(f'num_draft = {options.num_draft!r}: must be a number of drafts (0: none) or "auto".')
    if options.widths is not None and (not options.widths or min(options.widths) < 1):
        problems.append(f"widths = {options.widths}: a draft tree needs at least one candidate at every depth.")
    if problems:
        raise ConfigError(problems)
    num_drafts = _num_drafts(decoder, options)
    if options.widths and not (len(prompts) == 1 and options.sampling.is_greedy):
        raise UnsupportedError(
            f"widths = {options.widths}: a draft tree decodes one prompt greedily; here are {len(prompts)} prompts and "
            f"temperature = {options.sampling.temperature}. Leave widths unset for a chain of drafts."
        )
    _check_prompts(decoder, prompts, options)
    _check_memory(decoder, prompts, options, num_drafts)
    return num_drafts


def _num_drafts(decoder: Decoder, options: Options) -> int:
    depths = decoder.model.mtp_num_layers
    if options.widths:
        wanted = len(options.widths)
    elif isinstance(options.num_draft, int):
        wanted = options.num_draft
    else:  # "auto"
        wanted = (depths if decoder.is_parallel else max(depths, MAX_AUTO_DRAFTS)) if depths else 0
    if wanted and not depths:
        raise UnsupportedError(
            f"num_draft = {wanted}: drafts come from MTP layers, and this model has none (model.mtp_num_layers = 0). "
            "Decode with num_draft = 0, or train a drafter with the recipe mtp_finetune."
        )
    if decoder.is_parallel and wanted > depths:
        raise UnsupportedError(
            f"num_draft = {wanted}: parallel heads draft one token each, and model.mtp_num_layers = {depths}. "
            f"Use at most {depths}."
        )
    return wanted


def _check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], options: Options) -> None:
    context, vocab_size = options.context or decoder.model.seq_length, decoder.vocab_size
    if not prompts:
        raise DataError("There is no prompt.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                f"Prompt {row} is empty: decoding needs at least one token. Begin it with end-of-document, for example."
            )
        following = max(options.new_tokens(len(prompt), context), 1)
        if len(prompt) + following > context:
            raise DataError(
                f"Prompt {row} has {len(prompt)} tokens and {following} are to follow: more than the "
                f"context of {context} (model.seq_length). Shorten the prompt, request fewer tokens, or set a larger "
                "context if the model supports it."
            )
        if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
            raise DataError(
                f"Prompt {row} has the id {unknown[0]}: the model knows ids 0 to {vocab_size - 1}. Use the tokenizer "
                "that the model was trained with."
            )


def _check_memory(decoder: Decoder, prompts: Sequence[Sequence[int]], options: Options, num_drafts: int) -> None:
    slots = slots_needed(max(map(len, prompts)), options.max_new_tokens, round_tokens(num_drafts, options.widths))
    needed = decoder.cache_bytes(len(prompts), slots, num_drafts)
    if decoder.device.type == "cuda":
        free = torch.cuda.mem_get_info(decoder.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"The caches of {len(prompts)} prompts with {slots} slots need {needed / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} GiB are free on {decoder.device}. Decode fewer prompts at once, or fewer new tokens."
        )
