"""Checks of the sections dataset and tokenizer. No file is opened: that is the job of `megatron_mtp.data`."""

from __future__ import annotations

import math
from typing import Any

from megatron_mtp.config.derive import BYTES_VOCAB_SIZE
from megatron_mtp.config.filled import filled
from megatron_mtp.config.problem import problem
from megatron_mtp.config.quantity import read_number
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.errors import Problem, shown

BLEND_FORM = "must be [[prefix, ...], [weight, ...] or null], or a flat list of prefixes"


def data_problems(cfg: RunConfig) -> list[Problem]:
    """Every rule of the sections dataset and tokenizer."""
    data, problems = cfg.dataset, []
    if data.seq_length != cfg.model.seq_length:
        problems.append(problem(cfg, "dataset.seq_length", "must equal {model.seq_length=}", "Leave it unset."))
    if data.blend is not None and data.blend_per_split is not None:
        rule = "{dataset.blend_per_split} is given too"
        problems.append(problem(cfg, "dataset.blend", rule, "Set one of them to null."))
    for name in ("blend", "blend_per_split"):
        if data.mock and getattr(data, name) is not None:
            rule, remedy = (
                f"a blend is given too: {{dataset.{name}=}}",
                "Set dataset.mock = False, or the blend to null.",
            )
            problems.append(problem(cfg, "dataset.mock", rule, remedy))
    if data.loss_mask_suffix and data.mock:
        rule = "mock data has no files, {dataset.mock=}"
        problems.append(problem(cfg, "dataset.loss_mask_suffix", rule, "Set one of them to null or False."))
    return problems + _blend_problems(cfg) + _split_problems(cfg) + _tokenizer_problems(cfg)


def _blend_problems(cfg: RunConfig) -> list[Problem]:
    data, problems = cfg.dataset, []
    if (rule := blend_rule(data.blend)) is not None:
        problems.append(problem(cfg, "dataset.blend", rule))
    if data.blend_per_split is not None:
        if len(data.blend_per_split) != 3:
            rule = "needs three entries, for train, validation and test (null where a split is absent)"
            problems.append(problem(cfg, "dataset.blend_per_split", rule))
        for split, blend in zip(("train", "validation", "test"), data.blend_per_split, strict=False):
            if (rule := blend_rule(blend)) is not None:
                problems.append(problem(cfg, "dataset.blend_per_split", f"the entry for {split} {rule}"))
    for name, blend in (data.valid_sets or {}).items():
        if (rule := blend_rule(blend)) is not None:
            problems.append(problem(cfg, f"dataset.valid_sets.{name}", rule))
    return problems


def blend_rule(blend: Any) -> str | None:
    """The rule that a blend breaks. A blend is [[prefix, ...], [weight, ...] or None] or a flat list of prefixes."""
    if blend is None:
        return None
    if not isinstance(blend, list | tuple) or not blend:
        return BLEND_FORM
    if all(isinstance(prefix, str) for prefix in blend):
        return None
    prefixes, weights = blend[0], blend[1] if len(blend) == 2 else "missing"
    if not isinstance(prefixes, list | tuple) or not prefixes or not all(isinstance(p, str) for p in prefixes):
        return BLEND_FORM
    if weights is None:
        return None
    if not isinstance(weights, list | tuple) or not all(_is_number(weight) for weight in weights):
        return BLEND_FORM
    if len(weights) != len(prefixes):
        return f"has {len(prefixes)} prefixes and {len(weights)} weights; it needs one weight for each prefix"
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        return f"has weights {shown(weights)}, which must be finite and above 0"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split_problems(cfg: RunConfig) -> list[Problem]:
    split, name = cfg.dataset.split, "dataset.split"
    if split is None:
        rule = "{dataset.blend} needs shares of train, validation and test, such as 9999,8,2"
        return [] if cfg.dataset.blend is None else [problem(cfg, name, rule)]
    try:
        shares = [read_number(share, float) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        return [problem(cfg, name, "must be three shares such as 9999,8,2 (train, validation, test)")]
    return []


def _tokenizer_problems(cfg: RunConfig) -> list[Problem]:
    tokenizer, vocab_size, problems = cfg.tokenizer, cfg.model.vocab_size, []
    kind = tokenizer.tokenizer_type
    if kind in ("huggingface", "sentencepiece", "tiktoken") and tokenizer.tokenizer_model is None:
        rule = "needs {tokenizer.tokenizer_model}, the file of the tokenizer"
        problems.append(problem(cfg, "tokenizer.tokenizer_type", rule))
    if kind == "null":
        if vocab_size is None:
            rule = "needs {model.vocab_size} or {tokenizer.vocab_size}"
            problems.append(problem(cfg, "tokenizer.tokenizer_type", rule))
        elif filled(tokenizer.vocab_size) > vocab_size:
            problems.append(problem(cfg, "tokenizer.vocab_size", "must not be above {model.vocab_size=}"))
    elif tokenizer.vocab_size is not None:
        rule = "belongs to the null tokenizer, not to {tokenizer.tokenizer_type=}"
        problems.append(problem(cfg, "tokenizer.vocab_size", rule, "Use model.vocab_size."))
    if kind == "bytes" and filled(vocab_size) < BYTES_VOCAB_SIZE:
        rule = "the tokenizer of {tokenizer.tokenizer_type=} needs 257 (256 bytes and an end of document)"
        problems.append(problem(cfg, "model.vocab_size", rule))
    return problems
