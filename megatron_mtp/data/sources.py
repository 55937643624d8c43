"""From the dataset section of a config to the sources a run draws from: mock data or blends of indexed data sets."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.mock import MockSource
from megatron_mtp.data.source import SampleSource
from megatron_mtp.data.tokenizer import resolve_eod


def is_mock(cfg: ConfigContainer) -> bool:
    """Whether the run makes its data up."""
    return cfg.dataset.mock or (cfg.dataset.blend is None and cfg.dataset.blend_per_split is None)


def open_sources(cfg: ConfigContainer, vocab_size: int) -> tuple[SampleSource, dict[str, SampleSource]]:
    """The training source, and the validation sources by name ("valid" first); none if validation.eval_iters is 0."""
    seq_length = cfg.dataset.seq_length or cfg.model.seq_length
    eod = resolve_eod(cfg, vocab_size)
    train = MockSource(vocab_size, seq_length, eod, cfg.rng.seed, "train")
    valid = {"valid": MockSource(vocab_size, seq_length, eod, cfg.rng.seed, "valid")}
    return train, valid if cfg.validation.eval_iters else {}
