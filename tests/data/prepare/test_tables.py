"""Parquet and Arrow files give the documents that JSONL gives; folders of several splits are refused."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_mtp.data.prepare.jsonl import list_inputs, read_documents
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.errors import DataError

pytestmark = pytest.mark.unit
TEXTS = ["first", "", "größer\nthan a line", *(f"document {n}" for n in range(3000))]


@pytest.fixture(scope="module")
def pa():
    return pytest.importorskip("pyarrow", reason="pyarrow is an optional extra, megatron-mtp[parquet]")


def write_parquet(pa, path, texts=TEXTS, **columns):
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts, "id": list(range(len(texts))), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    return path


def test_rows_are_documents(pa, tmp_path):
    path = write_parquet(pa, tmp_path / "web.parquet")
    seen = []
    found = [(document.line, document.text) for document in read_documents(path, on_progress=seen.append)]
    assert found == list(enumerate(TEXTS, 1))
    assert sum(seen) == path.stat().st_size
    assert len(seen) > 2


def test_parquet_and_jsonl_give_the_same_data(pa, tmp_path):
    write_parquet(pa, tmp_path / "p" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "p" / "dataset_infos.json").write_text("{}")
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = PrepareOptions(tokenizer="bytes", shuffle=3)
    for source, out in (("p", "one"), ("web.jsonl", "two")):
        prepare([tmp_path / source], tmp_path / out, options, workers=1)
    for ending in (".bin", ".idx"):
        one, two = ((tmp_path / f"{out}_text_document{ending}").read_bytes() for out in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_saved_dataset_is_read(form, pa, tmp_path):
    """The files of `Dataset.save_to_disk`: Arrow data, listed in state.json; caches beside them are no data."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    table = pa.table({"text": TEXTS})
    for name, part in (("data-00000-of-00002.arrow", table[:1000]), ("data-00001-of-00002.arrow", table[1000:])):
        with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(folder / name), table.schema) as writer:
            writer.write_table(part, max_chunksize=300)
    (folder / "cache-1234.arrow").write_bytes(b"no data")
    names = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    for given in (folder, tmp_path / "saved"):
        files = list_inputs([given])
        assert [document.text for file in files for document in read_documents(file)] == TEXTS


def test_several_splits_are_refused(tmp_path):
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / "data" / name).touch()
    with pytest.raises(DataError, match=r"splits train, test\. Give those of one"):
        list_inputs([tmp_path / "hub"])
    assert len(list_inputs([tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"])) == 1
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"splits train, test\. Give one: .*saved/train"):
        list_inputs([tmp_path / "saved"])
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        list_inputs([tmp_path / "saved"])


def test_columns_and_rows_that_are_no_text(pa, tmp_path):
    path = write_parquet(pa, tmp_path / "a.parquet", ["x", None, "y"])
    with pytest.raises(DataError, match=r"a\.parquet:2: its 'text' is null"):
        list(read_documents(path))
    skipped = []
    assert [document.text for document in read_documents(path, on_bad_line=skipped.append)] == ["x", "y"]
    assert len(skipped) == 1
    with pytest.raises(DataError, match="no column 'body', only text, id"):
        list(read_documents(path, "body"))
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        list(read_documents(path, "id"))


def test_a_damaged_file_is_named(pa, tmp_path):
    path = write_parquet(pa, tmp_path / "a.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read to its end"):
        list(read_documents(path))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"needs pyarrow\. Install it with pip install 'megatron-mtp\[parquet\]'"):
        list(read_documents(tmp_path / "a.parquet"))
