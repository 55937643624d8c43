"""Trains a byte-level BPE tokenizer, as GPT-2's, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_mtp.data.files import replacing

EOD_TOKEN = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains on `texts` and writes `path`, a tokenizer.json, whole or not at all.

    Args:
        vocab_size: 257 or more: 256 bytes and the end-of-document token, which is id 0, then merges. The result has
            fewer ids where the texts give fewer merges.
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
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))
