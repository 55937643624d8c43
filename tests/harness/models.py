"""Small configs on the CPU."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.recipes import get_recipe

SMALL = (
    "model.hidden_size=32",
    "model.seq_length=32",
    "model.vocab_size=96",
    "model.make_vocab_size_divisible_by=8",  # the padding depends on TP
    "model.logits_chunk_tokens=7",
)
"""Overrides that make a tiny recipe smaller still."""


def small_config(recipe: str, overrides: tuple[str, ...], world_size: int) -> ConfigContainer:
    """A recipe with overrides, finalized for the CPU."""
    cfg = get_recipe(recipe)
    apply_overrides(cfg, ["dist.device=cpu", "dist.num_threads=1", *overrides])
    return cfg.finalize(world_size)
