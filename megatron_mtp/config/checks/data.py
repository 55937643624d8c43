"""Checks of the fields of dataset and tokenizer. No path is opened: the data room does that."""

from __future__ import annotations

import math
from typing import Any

from megatron_mtp.config.container import ConfigContainer


def data_problems(cfg: ConfigContainer) -> list[str]:
    """Fields of dataset and tokenizer; files are opened by the data room only."""
    data, problems = cfg.dataset, []
    if data.seq_length != cfg.model.seq_length:
        problems.append(
            f"dataset.seq_length = {data.seq_length}: must equal model.seq_length = {cfg.model.seq_length}. "
            "Leave it unset."
        )
    if data.blend is not None and data.blend_per_split is not None:
        problems.append("dataset.blend and dataset.blend_per_split: give one of them.")
    if data.mock and (data.blend is not None or data.blend_per_split is not None):
        problems.append("dataset.mock = True: a blend is given too. Set dataset.mock = False, or the blend to null.")
    if data.loss_mask_suffix == "":
        problems.append(
            "dataset.loss_mask_suffix = '': the mask would be the tokens themselves. Give a suffix, or null."
        )
    if data.loss_mask_suffix and data.mock:
        problems.append(
            f"dataset.loss_mask_suffix = {data.loss_mask_suffix!r}: mock data has no files, dataset.mock = True. Set one of "
            "them to null or False."
        )
    problems += blend_problems("dataset.blend", data.blend)
    if data.blend_per_split is not None:
        if len(data.blend_per_split) != 3:
            problems.append(
                f"dataset.blend_per_split has {len(data.blend_per_split)} entries; it needs three, for train, validation "
                "and test (null where a split is absent)."
            )
        for name, blend in zip(("train", "validation", "test"), data.blend_per_split, strict=False):
            problems += blend_problems(f"dataset.blend_per_split ({name})", blend)
    for name, blend in (data.valid_sets or {}).items():
        problems += blend_problems(f"dataset.valid_sets.{name}", blend)
    return problems + _split_problems(cfg) + _tokenizer_problems(cfg)


def blend_problems(name: str, blend: Any) -> list[str]:
    """A blend is [[prefix, ...], [weight, ...] or None] or a flat list of prefixes."""
    form = "must be [[prefix, ...], [weight, ...] or null], or a flat list of prefixes"
    if blend is None:
        return []
    if not isinstance(blend, list | tuple) or not blend:
        return [f"{name} = {blend!r}: {form}."]
    if all(isinstance(prefix, str) for prefix in blend):
        return []
    prefixes, weights = blend[0], blend[1] if len(blend) == 2 else "missing"
    if not isinstance(prefixes, list | tuple) or not prefixes or not all(isinstance(p, str) for p in prefixes):
        return [f"{name} = {blend!r}: {form}."]
    if weights is None:
        return []
    if not isinstance(weights, list | tuple) or not all(_is_number(weight) for weight in weights):
        return [f"{name} = {blend!r}: {form}."]
    if len(weights) != len(prefixes):
        return [f"{name} has {len(prefixes)} prefixes and {len(weights)} weights; give one weight for each prefix."]
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        return [f"{name}: weights {weights} must be finite and above 0."]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split_problems(cfg: ConfigContainer) -> list[str]:
    split = cfg.dataset.split
    if split is None:
        if cfg.dataset.blend is not None:
            return ["dataset.split = null: dataset.blend needs shares of train, validation and test, such as 9999,8,2."]
        return []
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        return [f"dataset.split = {split!r}: must be three shares such as 9999,8,2 (train, validation, test)."]
    return []


def _tokenizer_problems(cfg: ConfigContainer) -> list[str]:
    tokenizer, vocab_size, problems = cfg.tokenizer, cfg.model.vocab_size, []
    kind = tokenizer.tokenizer_type
    if kind in ("huggingface", "sentencepiece", "tiktoken") and tokenizer.tokenizer_model is None:
        problems.append(
            f"tokenizer.tokenizer_type = {kind!r}: needs tokenizer.tokenizer_model, the file of the tokenizer."
        )
    if kind == "null":
        if vocab_size is None:
            problems.append("tokenizer.tokenizer_type = 'null': needs model.vocab_size or tokenizer.vocab_size.")
        elif tokenizer.vocab_size > vocab_size:
            problems.append(
                f"tokenizer.vocab_size = {tokenizer.vocab_size}: must not be above model.vocab_size = {vocab_size}."
            )
    elif tokenizer.vocab_size is not None:
        problems.append(
            f"tokenizer.vocab_size = {tokenizer.vocab_size}: only the null tokenizer takes it; use model.vocab_size."
        )
    if kind == "bytes" and vocab_size < 257:
        problems.append(
            f"model.vocab_size = {vocab_size}: the bytes tokenizer needs 257 (256 bytes and an end of document)."
        )
    return problems
