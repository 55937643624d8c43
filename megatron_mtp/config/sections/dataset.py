"""Megatron `.bin/.idx` datasets and how samples are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_TOKENS, Derived, knob


@dataclass(kw_only=True, slots=True)
class DatasetConfig(Section):
    """Megatron `.bin/.idx` datasets and how samples are made of them."""

    SECTION: ClassVar[str] = "dataset"

    blend: list[Any] | None = knob(None, is_path=True, may_be_address=True, phase="data")
    """[[prefix, ...], [weight, ...] or None], or a flat list of prefixes, or of weights and prefixes in turn; None (and
    no blend_per_split): mock data. A prefix is a path, or an address such as s3://bucket/corpus/web."""
    blend_per_split: list[Any] | None = knob(None, is_path=True, may_be_address=True, phase="data")
    """One blend for each of train, validation, test (None where validation or test is absent)."""
    budgets: dict[str, int | str] | None = knob(None, gt=0, le=MAX_TOKENS, phase="data")
    """The most that the run draws from some training prefixes: file name -> tokens ("20B") or epochs ("4 epochs"). Once
    it is used up, the other prefixes take its place by their weights."""
    split: str | None = knob("9999,8,2", phase="data")
    """Shares of train, validation and test within each prefix of `blend`; 0 for validation: only `valid_sets` are
    evaluated."""
    seq_length: Derived[int] = knob(None, ge=1, le=2**31, phase="data")
    """Tokens in one sample; None: model.seq_length."""
    path_to_cache: str | None = knob(None, is_path=True, is_written=True, resume="free", phase="free")
    """Folder for the index files; None: next to each prefix; of an address, in
    `object_storage_cache_path`."""
    object_storage_cache_path: str | None = knob(
        None, is_path=True, is_written=True, is_scratch=True, resume="free", phase="free"
    )
    """Folder on a local disk of each machine for blocks of the data whose prefixes are addresses, such as
    s3://bucket/corpus/web; made if it is absent, and free to be deleted between runs."""
    object_storage_cache_gib: float = knob(100.0, ge=0.0625, le=2**20, resume="free", phase="free")
    """GiB of blocks in `object_storage_cache_path`; those used longest ago are deleted. With room for all of the data,
    each block is downloaded once."""
    valid_sets: dict[str, list[Any]] | None = knob(None, is_path=True, may_be_address=True, resume="free", phase="free")
    """Validation sets in addition to the main one, or without it: name -> blend. Each is reported under its name."""
    eod_mask_loss: bool = knob(False, phase="free")
    """Targets after an end-of-document token carry no loss."""
    loss_mask_suffix: str | None = knob(None, is_path=True, phase="free")
    """Next to each prefix lies <prefix><suffix>.bin/.idx with one number for each token: 0 if it is no target, as
    in a prompt. None: every token is a target."""
    reset_attention_mask: bool = knob(False, phase="free")
    """Attention stays within a document, and no depth predicts across its end."""
    reset_position_ids: bool = knob(False, phase="free")
    """Positions start at 0 again at each document."""
    fim_rate: float = knob(0.0, ge=0, le=1, phase="data")
    """Share of the training documents that are rearranged for fill-in-the-middle (docs/data.md); DeepSeek-V3: 0.1."""
    fim_spm_rate: float = knob(0.0, ge=0, le=1, phase="data")
    """Share of these with the suffix first (SPM); the others have the prefix first (PSM)."""
    fim_tokens: list[str] | None = knob(None, phase="data")
    """The tokenizer's names of the sentinels before prefix, suffix and middle; None: the first known names it has."""
    fim_cut: Literal["character", "token"] = knob("character", phase="data")
    """Cuts lie between characters, where the tokenizer can spell the pieces of a token, or between tokens only."""
    fim_prefixes: list[str] | None = knob(None, phase="data")
    """File names of the training prefixes whose documents are rearranged, such as those of code; None: all."""
    fim_sentinel_loss: bool = knob(True, phase="free")
    """Sentinels are targets, as in the published runs; False: no depth has a loss on them."""
    mock: bool = knob(False, phase="data")
    """Random tokens that repeat with a pattern, made from rng.seed; no files needed."""
    prefetch_steps: int = knob(2, ge=0, le=1000, resume="free", phase="free")
    """Global batches read ahead by a background thread; 0: none."""
    check_token_ids: bool = knob(True, resume="free", phase="free")
    """Compare the ids of each batch with the vocabulary."""
