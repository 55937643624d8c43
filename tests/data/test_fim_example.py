"""The example of docs/data.md: what a fill-in-the-middle sample holds at each depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.data.batch import BatchRules, make_micro_batch
from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.fim import FillInTheMiddle
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.looking import Marks, as_table

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
DOCUMENTS = ["def add ( a , b ) : return a + b", "y = 1"]
SENTINELS = ["<PRE>", "<SUF>", "<MID>"]
WORDS = ["<|eos|>", *SENTINELS, *sorted({word for document in DOCUMENTS for word in document.split()})]
SEED = 83
"""Cuts the first document in three parts of some length, and leaves the second as it is."""


def example(folder: Path) -> str:
    """The table that `data show --depths` prints of the first sample, with D = 2 and documents apart."""
    writer = IndexedWriter(str(folder / "code"), np.dtype(np.uint16))
    for document in DOCUMENTS:
        ids = [WORDS.index(word) for word in [*document.split(), "<|eos|>"]]
        writer.write(np.array(ids), np.array([len(ids)]))
    writer.close()
    reader = IndexedReader(str(folder / "code"))
    fim = FillInTheMiddle(rate=0.5, spm_rate=0.0, sentinels=(1, 2, 3), eod=0, seed=SEED, name="code")
    corpus = Corpus(reader, (0, 2), "train", 18, 0, SEED, None, fim)
    corpus.build_index(None)
    sample = corpus.read(0)
    batch = make_micro_batch([sample], BatchRules(num_depths=2, separate_documents=True))
    return "\n".join(as_table(sample, batch, lambda ids: " ".join(WORDS[i] for i in ids), Marks("[-", "-]")))


def test_the_page_shows_what_the_code_makes(tmp_path):
    assert f"```text\n{example(tmp_path)}\n```" in PAGE.read_text(encoding="utf-8")
