"""The tokenizer that made the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import knob


@dataclass(kw_only=True, slots=True)
class TokenizerConfig(Section):
    """The tokenizer that made the data."""

    SECTION: ClassVar[str] = "tokenizer"

    tokenizer_type: Literal["huggingface", "sentencepiece", "tiktoken", "bytes", "null"] = "null"
    """bytes: 256 bytes and an end-of-document id; null: integers only, vocab_size needed."""
    tokenizer_model: str | None = knob(None, is_path=True, resume="free")
    """tokenizer.json or a folder with one (huggingface), *.model (sentencepiece), *.tiktoken or a JSON (tiktoken)."""
    vocab_size: int | None = knob(None, ge=1, le=2**31)
    """For null: the number of ids; its last id ends a document."""
