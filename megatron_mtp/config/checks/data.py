"""Checks of the sections dataset and tokenizer. No file is opened: that is the job of `megatron_mtp.data`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from megatron_mtp.config.blend import (
    MAIN_LABEL,
    SPLITS,
    Budget,
    has_addresses,
    is_mock,
    parse_blend,
    parse_split,
    training_blend,
    valid_names,
)
from megatron_mtp.config.derive import BYTES_VOCAB_SIZE
from megatron_mtp.config.filled import filled
from megatron_mtp.config.problem import problem, refusal
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.errors import ConfigError, Problem


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
            rule = f"a blend is given too: {{dataset.{name}=}}"
            remedy = "Set dataset.mock = False, or the blend to null."
            problems.append(problem(cfg, "dataset.mock", rule, remedy))
    if data.loss_mask_suffix and data.mock:
        rule = "mock data has no files, {dataset.mock=}"
        problems.append(problem(cfg, "dataset.loss_mask_suffix", rule, "Set one of them to null or False."))
    blends, splits = _blend_problems(cfg), _split_problems(cfg)
    once = [] if blends or splits else _once_problems(cfg)
    named = [] if blends else _fim_problems(cfg) + _budget_problems(cfg) + _cache_problems(cfg)
    return problems + blends + splits + once + named + _tokenizer_problems(cfg)


def _cache_problems(cfg: RunConfig) -> list[Problem]:
    """Whether data in object storage has a place on the local disk; needs blends that can be read."""
    if cfg.dataset.object_storage_cache_path is not None or not has_addresses(cfg.dataset):
        return []
    rule = "data lies in object storage, which is read through a cache on a local disk"
    remedy = "Name a folder on a disk of each machine; dataset.object_storage_cache_gib bounds its size."
    return [problem(cfg, "dataset.object_storage_cache_path", rule, remedy)]


def _budget_problems(cfg: RunConfig) -> list[Problem]:
    """Budgets of sources; needs blends that can be read."""
    budgets, problems = cfg.dataset.budgets, []
    if not budgets:
        return []
    problems += _unknown_names(cfg, "dataset.budgets", budgets)
    if not problems and set(_training_names(cfg)) <= set(budgets):
        rule = "one training prefix must have no budget, to take the place of those that are used up"
        remedy = "Leave one out; the length of the run is train.train_tokens."
        problems.append(problem(cfg, "dataset.budgets", rule, remedy))
    for name, value in budgets.items():
        try:
            Budget.parse(value)
        except ConfigError as error:
            problems += [replace(found, fields=(f"dataset.budgets.{name}",)) for found in error.problems]
    return problems


def _unknown_names(cfg: RunConfig, field: str, given: Iterable[str]) -> list[Problem]:
    names = _training_names(cfg)
    if not (unknown := sorted(set(given) - set(names))):
        return []
    rule = "{unknown}: no such file name among the training prefixes ({names})"
    return [problem(cfg, field, rule, unknown=", ".join(unknown), names=", ".join(names))]


def _training_names(cfg: RunConfig) -> list[str]:
    """File names of the training prefixes."""
    blend = training_blend(cfg.dataset)
    return [] if blend is None else [PurePath(prefix).name for prefix in blend.prefixes]


def _fim_problems(cfg: RunConfig) -> list[Problem]:
    """Fill-in-the-middle; needs blends that can be read."""
    data, problems = cfg.dataset, []
    tokens = data.fim_tokens
    if tokens is not None and (len(set(tokens)) != 3 or len(tokens) != 3):
        rule = "must name three different tokens, those before prefix, suffix and middle"
        problems.append(problem(cfg, "dataset.fim_tokens", rule))
    if data.fim_rate and is_mock(data):
        rule = "mock data has no documents to rearrange"
        problems.append(problem(cfg, "dataset.fim_rate", rule, "Give a dataset.blend, or set it to 0."))
    elif data.fim_prefixes is not None:
        problems += _unknown_names(cfg, "dataset.fim_prefixes", data.fim_prefixes)
    return problems


def _once_problems(cfg: RunConfig) -> list[Problem]:
    """Whether an evaluation can take each sample once; needs a blend and a split that can be read."""
    if not cfg.validation.reads_once:
        return []
    name, problems = "validation.eval_iters", []
    if is_mock(cfg.dataset) and SPLITS[1] in valid_names(cfg.dataset):
        rule = "takes each sample of each validation set once, and mock data has no end"
        remedy = "Give a number of batches, or dataset.split = '1,0,0' to evaluate dataset.valid_sets only."
        problems.append(problem(cfg, name, rule, remedy))
    if cfg.model.moe_expert_capacity_factor is not None:
        rule = (
            "fills the last batch of a set, and with {model.moe_expert_capacity_factor=} what fills it would push "
            "tokens of the set out of experts"
        )
        problems.append(refusal(cfg, name, rule, "Give a number of batches."))
    return problems


def _blend_problems(cfg: RunConfig) -> list[Problem]:
    data, problems, taken = cfg.dataset, [], (*SPLITS, MAIN_LABEL)
    blends: list[tuple[str, str, Any]] = [("dataset.blend", "", data.blend)]
    if data.blend_per_split is not None:
        if len(data.blend_per_split) != len(SPLITS) or data.blend_per_split[0] is None:
            rule = "needs three entries, for train, validation and test (null where validation or test is absent)"
            problems.append(problem(cfg, "dataset.blend_per_split", rule))
        entries = zip(("train", "validation", "test"), data.blend_per_split, strict=False)
        blends += [("dataset.blend_per_split", f"the entry for {split} ", blend) for split, blend in entries]
    for name, blend in (data.valid_sets or {}).items():
        if name in taken or not re.fullmatch(r"[\w.-]+", name):
            rule = f"a name consists of letters, digits, '_', '-' and '.', and is none of {', '.join(taken)}"
            problems.append(problem(cfg, f"dataset.valid_sets.{name}", rule, "Choose another name."))
        blends.append((f"dataset.valid_sets.{name}", "", blend))
    for field, subject, blend in blends:
        try:
            if blend is not None:
                parse_blend(blend)
        except ValueError as error:
            problems.append(problem(cfg, field, f"{subject}{error}"))
    return problems


def _split_problems(cfg: RunConfig) -> list[Problem]:
    split, name = cfg.dataset.split, "dataset.split"
    if split is None:
        rule = "{dataset.blend} needs shares of train, validation and test, such as 9999,8,2"
        return [] if cfg.dataset.blend is None else [problem(cfg, name, rule)]
    try:
        parse_split(split)
    except ValueError as error:
        return [problem(cfg, name, str(error))]
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
        rule = "the tokenizer of {tokenizer.tokenizer_type=} needs {size} (an id for each byte and the end of document)"
        problems.append(problem(cfg, "model.vocab_size", rule, size=BYTES_VOCAB_SIZE))
    return problems
