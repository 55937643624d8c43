import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.data.corpus import Corpus, split_range
from megatron_mtp.data.data_file import StoredTable
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.errors import ConfigError, DataError
from megatron_mtp.recipes import get_recipe
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit


def open_corpus(prefix, seq_length=8, seed=1, which="train", eod=99, cache=None):
    reader = IndexedReader(str(prefix))
    corpus = Corpus(reader, (0, len(reader)), which, seq_length, eod, seed)
    corpus.build_index(cache)
    return corpus


def table(corpus):
    return [corpus._index[row, :].tolist() for row in (0, 1)]


@given(st.integers(1, 5000), st.lists(st.integers(0, 10000), min_size=3, max_size=3))
def test_split_is_megatrons(num_documents, shares):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    if sum(shares) == 0:
        return
    text = ",".join(map(str, shares))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
    for which, bookends in zip(("train", "valid", "test"), matrix, strict=True):
        first, last = split_range(text, which, num_documents)
        if bookends is None:
            assert first == last
        else:
            assert (first, last) == tuple(round(end * float(num_documents)) for end in bookends)


@pytest.mark.parametrize("split", ["", "0,0,0", "1,1", "1,1,1,1", "9,nan,1", "none"])
def test_bad_split_is_refused(split):
    cfg = get_recipe("tiny_dense")
    cfg.dataset.split = split
    with pytest.raises(ConfigError, match=r"dataset\.split = .* must be three shares"):
        cfg.finalize()


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), seq_length=st.integers(2, 12), seed=st.integers(0, 9)
)
def test_samples_are_the_shuffled_documents_end_to_end(tmp_path_factory, lengths, seq_length, seed):
    prefix = tmp_path_factory.mktemp("corpus") / "a"
    documents = write_corpus(prefix, lengths)
    if sum(lengths) <= seq_length:
        return
    corpus = open_corpus(prefix, seq_length, seed)
    order = corpus._index[0, :-1].tolist()
    assert sorted(order) == list(range(len(documents)))
    stream = [token for i in order for token in documents[i]]
    first = [place == 0 for i in order for place in range(len(documents[i]))]
    assert corpus.num_samples == (len(stream) - 1) // seq_length
    for n in range(corpus.num_samples):
        sample = corpus.read(n)
        span = slice(n * seq_length, n * seq_length + seq_length + 1)
        assert sample.tokens.tolist() == stream[span]
        assert sample.starts.tolist() == first[span]


def test_samples_are_those_of_megatrons_sample_index(tmp_path):
    from megatron.core.datasets.helpers import build_sample_idx

    prefix, s = tmp_path / "a", 16
    write_corpus(prefix, np.random.default_rng(0).integers(1, 60, 50))
    corpus = open_corpus(prefix, s)
    order = corpus._index[0, :-1].astype(np.int32)
    lengths = corpus.reader.lengths()
    index = build_sample_idx(lengths, order, s, 1, int(lengths.sum()), True, True)
    assert len(index) == corpus.num_samples + 1
    for n in range(corpus.num_samples):
        document, offset = index[n]
        complete = np.concatenate([corpus.reader.read(int(i)) for i in order[document:]])
        assert corpus.read(n).tokens.tolist() == complete[offset : offset + s + 1].tolist()


def test_documents_start_after_an_eod_inside_a_document_too(tmp_path):
    write_corpus(tmp_path / "a", [20], eod=3, vocab_size=5)
    corpus = open_corpus(tmp_path / "a", seq_length=19, eod=2)
    sample = corpus.read(0)
    assert (sample.tokens[:-1] == 2).any()
    assert (sample.starts[1:] == (sample.tokens[:-1] == 2)).all()


def test_too_small_split_is_named(tmp_path):
    write_corpus(tmp_path / "a", [5, 6])
    with pytest.raises(DataError, match=r"a: its valid split holds 11 tokens in 2 of 2 documents.*eval_iters = 0"):
        open_corpus(tmp_path / "a", seq_length=11, which="valid")
    assert open_corpus(tmp_path / "a", seq_length=10).num_samples == 1


def test_index_is_cached_under_a_key_of_all_it_depends_on(tmp_path):
    prefix, cache = tmp_path / "a", tmp_path / "cache"
    write_corpus(prefix, [10] * 20)

    def files():
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.npy")}

    first = open_corpus(prefix, cache=str(cache))
    built = files()
    assert len(built) == 1
    again = open_corpus(prefix, seq_length=4, cache=str(cache))
    assert files() == built
    assert table(again) == table(first)
    assert isinstance(again._index, StoredTable)
    other = open_corpus(prefix, seed=2, cache=str(cache))
    assert len(files()) == 2
    assert table(other) != table(first)
    open_corpus(prefix, which="valid", cache=str(cache))
    assert len(files()) == 3
    write_corpus(prefix, [10] * 20, seed=5)
    open_corpus(prefix, cache=str(cache))
    assert len(files()) == 4


def test_without_a_cache_folder_it_lies_beside_the_prefix_or_in_memory(tmp_path, monkeypatch, caplog):
    prefix = tmp_path / "a"
    write_corpus(prefix, [10] * 20)
    expected = table(open_corpus(prefix))
    assert len(list((tmp_path / "a_cache").glob("*.npy"))) == 1

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megatron_mtp.data.corpus.cached_array", refuse)
    assert table(open_corpus(prefix)) == expected
    assert "set dataset.path_to_cache" in caplog.text
    with pytest.raises(DataError, match=r"path_to_cache = .*Permission denied"):
        open_corpus(prefix, cache=os.fspath(tmp_path / "x"))
