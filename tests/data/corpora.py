"""Small data sets on disk, and hashes of their samples."""

import hashlib

import numpy as np

from megatron_mtp.data.batch import GlobalBatch
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


def hash_samples(batch: GlobalBatch) -> dict[int, tuple[int, str]]:
    """Place in the global batch -> (sample id, hash of its tokens and labels), for the samples this rank holds.

    The union over data-parallel ranks must be the same for every data-parallel and micro-batch size.
    """
    hashes = {}
    for places, micro_batch in zip(batch.places, batch.micro_batches, strict=True):
        for row, place in enumerate(places):
            text = micro_batch.tokens[row].numpy().tobytes() + micro_batch.labels[:, row].contiguous().numpy().tobytes()
            hashes[int(place)] = (int(batch.sample_ids[place]), hashlib.sha256(text).hexdigest())
    return hashes
