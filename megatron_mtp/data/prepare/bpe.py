"""Trains a byte-level BPE tokenizer like GPT-2's with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_mtp.data.files import write_atomically

EOD_TOKEN = "<|endoftext|>"
VOCAB_SIZES = (257, 2**20)
"""Least and most ids: the bytes and the end of a document, and what the library may reserve memory for."""


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains on `texts` and writes the tokenizer.json `path` atomically.

    Args:
        vocab_size: at least 257: the end-of-document token, which is id 0, 256 bytes, then merges. The result has fewer
            ids if the texts allow fewer merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tokenizer.to_str(pretty=True).encode())  # its own `save` raises a bare Exception
