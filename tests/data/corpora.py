"""Small data sets on disk for the tests of this room."""

import numpy as np

from megatron_mtp.data.indexed import IndexedWriter


def write_corpus(prefix, lengths, vocab_size=100, eod=99, seed=0, dtype=np.uint16):
    """Documents of random ids below `eod` that end with it; returns them as lists."""
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(0, min(eod, vocab_size), length - 1).tolist(), eod] for length in lengths]
    writer = IndexedWriter(str(prefix), dtype)
    for document in documents:
        writer.write(np.array(document), np.array([len(document)]))
    writer.close()
    return documents
