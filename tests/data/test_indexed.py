import os
import struct

import numpy as np
import pytest

from megatron_mtp.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_mtp.errors import DataError
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_megatron_cores(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = write_corpus(tmp_path / "ours", [5, 1, 7, 300], dtype=dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()

    theirs, ours = IndexedDataset(str(tmp_path / "ours")), IndexedReader(str(tmp_path / "theirs"))
    assert len(theirs) == len(ours) == 4
    assert ours.dtype == dtype
    assert ours.lengths().tolist() == theirs.sequence_lengths.tolist()
    for i, document in enumerate(documents):
        assert ours.read(i).tolist() == theirs[i].tolist() == document
    assert ours.read(3, 10, 5).tolist() == theirs.get(3, 10, 5).tolist() == documents[3][10:15]
    assert ours.read(3, 290).tolist() == documents[3][290:]


def test_dtype_rule_is_megatron_cores():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (2, 65499, 65500, 65536, 200000):
        assert token_dtype(size) == DType.optimal_dtype(size)


def test_many_documents_at_once_and_token_counts(tmp_path):
    writer = IndexedWriter(str(tmp_path / "a"), np.uint16)
    writer.write(np.arange(6), np.array([1, 5]))
    writer.write(np.arange(4), np.array([0, 4]))
    assert writer.close() == (4, 10)
    reader = IndexedReader(str(tmp_path / "a"))
    assert [reader.read(i).tolist() for i in range(4)] == [[0], [1, 2, 3, 4, 5], [], [0, 1, 2, 3]]
    assert [reader.count_tokens(a, b) for a, b in [(0, 4), (1, 2), (2, 3), (3, 3), (1, 4)]] == [10, 5, 0, 0, 9]


def test_missing_empty_truncated_and_foreign_files_are_named_with_sizes(tmp_path):
    prefix = tmp_path / "a"
    write_corpus(prefix, [5, 7])
    bin_path, idx_path = tmp_path / "a.bin", tmp_path / "a.idx"
    whole_bin, whole_idx = bin_path.read_bytes(), idx_path.read_bytes()

    def error():
        with pytest.raises(DataError) as info:
            IndexedReader(str(prefix))
        return str(info.value)

    bin_path.write_bytes(whole_bin[:-3])
    assert f"{bin_path}: holds 21 bytes" in error()
    assert "describes 24" in error()
    bin_path.write_bytes(whole_bin + b"x")
    assert "holds 25 bytes" in error()
    bin_path.write_bytes(b"")
    assert f"{bin_path}: is empty (0 bytes)" in error()
    os.remove(bin_path)
    assert f"{bin_path}: cannot be read" in error()
    bin_path.write_bytes(whole_bin)
    for cut in (10, 40, len(whole_idx) - 1):
        idx_path.write_bytes(whole_idx[:cut])
        assert f"{idx_path}: holds {cut} bytes" in error()
    idx_path.write_bytes(b"not an index" + whole_idx)
    assert f"{idx_path}: is not a Megatron index" in error()
    idx_path.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 1) + bytes(8))
    assert "describes no documents" in error()
    idx_path.write_bytes(whole_idx)
    assert len(IndexedReader(str(prefix))) == 2


def read_all(prefix):
    reader = IndexedReader(str(prefix))
    return [reader.read(i).tolist() for i in range(len(reader))], reader.count_tokens(3, len(reader))


def test_no_flipped_bit_of_an_index_gives_other_documents(tmp_path):
    prefix, rng = tmp_path / "a", np.random.default_rng(5)
    write_corpus(prefix, rng.integers(0, 40, 100) + 1)
    whole, expected = (tmp_path / "a.idx").read_bytes(), read_all(prefix)
    marks_begin, refusals = 34 + 100 * 12, []
    for bit in rng.choice(len(whole) * 8, 300, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.idx").write_bytes(damaged)
        try:
            assert read_all(prefix) == expected, bit
            assert bit // 8 >= marks_begin, "only the document index may be damaged without harm: nothing reads it"
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 200
    assert all(str(prefix) in refusal for refusal in refusals)


@pytest.mark.parametrize(("entry", "value"), [(0, -1), (0, 101), (40, 38), (100, 101)])
def test_document_index_must_rise_and_stay_in_range(tmp_path, monkeypatch, entry, value):
    monkeypatch.setattr("megatron_mtp.data.indexed._BLOCK", 40)  # the last entries lie in the third block
    write_corpus(tmp_path / "a", [3] * 100)
    whole = bytearray((tmp_path / "a.idx").read_bytes())
    assert len(read_all(tmp_path / "a")[0]) == 100
    struct.pack_into("<q", whole, 34 + 100 * 12 + entry * 8, value)
    (tmp_path / "a.idx").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.idx: its document index is damaged"):
        IndexedReader(str(tmp_path / "a"))


def test_a_length_and_an_offset_that_disagree_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mtp.data.indexed._BLOCK", 7)
    write_corpus(tmp_path / "a", [3] * 20)
    whole = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<q", whole, 34 + 20 * 4 + 14 * 8, 14 * 6 + 2)  # the first of the third block
    (tmp_path / "a.idx").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.idx: is damaged at sequence 14 \(length 3, offset 86\)"):
        IndexedReader(str(tmp_path / "a"))


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, ending):
    write_corpus(tmp_path / "a", [3])
    (tmp_path / f"a.{ending}").unlink()
    (tmp_path / f"a.{ending}").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        IndexedReader(str(tmp_path / "a"))
