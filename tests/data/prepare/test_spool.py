import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.data.prepare.spool import Buckets, Spool, SpoolWriter, is_complete, regroup

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.randoms())
def test_regroup_moves_whole_documents(lengths, random):
    documents = [[100 * place + i for i in range(length)] for place, length in enumerate(lengths)]
    order = list(range(len(lengths)))
    random.shuffle(order)
    flat = np.array([token for document in documents for token in document], int)
    moved = regroup(flat, np.array(lengths), np.array(order))
    assert moved.tolist() == [token for place in order for token in documents[place]]


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=8),
    st.integers(1, 5),
    st.sampled_from([None, 0, 7]),
    st.integers(1, 30),
)
def test_buckets_hold_every_document_once_whatever_the_runs(tmp_path_factory, batches, count, seed, run_tokens):
    path = tmp_path_factory.mktemp("spool") / "s"
    buckets = Buckets(count, seed)
    writer = SpoolWriter(path, 3, buckets, np.dtype(np.uint16), run_tokens)
    flat, documents = 0, []
    for lengths in batches:
        documents += [list(range(flat + sum(lengths[:i]), flat + sum(lengths[: i + 1]))) for i in range(len(lengths))]
        writer.add(np.arange(flat, flat + sum(lengths)), np.array(lengths, int))
        flat += sum(lengths)
    assert not is_complete(path)
    writer.close()
    assert is_complete(path)
    spool = Spool(path, np.dtype(np.uint16), count)
    assert spool.count_documents().sum() == len(documents)
    assert (spool.counts.documents, spool.counts.tokens) == (len(documents), flat)
    assert spool.counts.largest_id == flat - 1
    expected = buckets.of(np.arange(len(documents)), 3)
    for bucket in range(count):
        read = []
        for tokens, lengths, _ in spool.read(bucket):
            read += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
        assert read == [document for document, where in zip(documents, expected, strict=True) if where == bucket]


def test_buckets_are_filled_evenly_and_differ_between_files():
    buckets = Buckets(10, 1)
    sizes = np.bincount(buckets.of(np.arange(20000), 0))
    assert sizes.min() > 1800
    assert not (buckets.of(np.arange(100), 0) == buckets.of(np.arange(100), 1)).all()
    assert sorted(buckets.order(0, 50).tolist()) == list(range(50))
    assert buckets.order(0, 50).tolist() != list(range(50))
    assert Buckets(3, None).of(np.arange(5), 0).tolist() == [0, 1, 2, 0, 1]
