"""Joined and divided data sets hold the documents of their sources, to the byte, and Megatron-Core reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.config.blend import SPLITS
from megatron_mtp.data.check import check_files
from megatron_mtp.data.corpus import split_range
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.merging import merge, split
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.errors import DataError
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit


def documents(prefix: str | Path) -> list[list[int]]:
    reader = IndexedReader(str(prefix))
    return [reader.read(number).tolist() for number in range(len(reader))]


@pytest.fixture
def prepared(tmp_path: Path) -> list[str]:
    """Two data sets of the bytes tokenizer."""
    made = []
    for name, count in (("a", 30), ("b", 7)):
        lines = "".join(f'{{"text": "{name} {number} {"x" * number}"}}\n' for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        options = PrepareOptions(tokenizer="bytes")
        made += prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, options, workers=1).prefixes
    return made


def test_a_merge_holds_all_documents_in_order(prepared: list[str], tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    out = str(tmp_path / "new" / "all")
    made = merge(out, prepared)
    expected = [document for prefix in prepared for document in documents(prefix)]
    assert documents(out) == expected
    assert (made.num_documents, made.num_tokens) == (37, sum(map(len, expected)))
    assert check_files(out).has_checksums
    sidecar = Sidecar.load(out)
    assert sidecar.sources == prepared
    assert sidecar.largest_id == max(map(max, expected))
    theirs = IndexedDataset(out)
    assert [theirs[number].tolist() for number in range(len(theirs))] == expected
    assert sorted(path.name for path in Path(out).parent.iterdir()) == ["all.bin", "all.idx", "all.json"]


def test_blocks_of_any_size_give_the_same_files(prepared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    for block in ((1 << 16, 1 << 24), (7, 50), (1, 1)):
        monkeypatch.setattr("megatron_mtp.data.merging._BLOCK_DOCUMENTS", block[0])
        monkeypatch.setattr("megatron_mtp.data.merging._BLOCK_TOKENS", block[1])
        merge(f"{tmp_path}/out", prepared, overwrite=True)
        made.append([(tmp_path / f"out{ending}").read_bytes() for ending in (".bin", ".idx")])
    assert made[0] == made[1] == made[2]


def test_shares_are_those_of_a_run(prepared: list[str], tmp_path: Path):
    whole = documents(prepared[0])
    made = split(prepared[0], "70,20,10", str(tmp_path / "part"))
    for which, part in zip(SPLITS, made, strict=True):
        first, last = split_range("70,20,10", which, len(whole))
        assert part.prefix == f"{tmp_path}/part_{which}"
        assert documents(part.prefix) == whole[first:last]
        assert check_files(part.prefix).has_checksums
    assert len({Sidecar.load(part.prefix).plan for part in made}) == 3


def test_a_share_of_zero_is_left_out_and_one_without_documents_is_refused(prepared: list[str], tmp_path: Path):
    assert [part.prefix for part in split(prepared[0], "9,1,0", f"{tmp_path}/p")] == [
        f"{tmp_path}/p_train", f"{tmp_path}/p_valid"
    ]  # fmt: skip
    with pytest.raises(DataError, match="leaves test none of the 30 documents"):
        split(prepared[0], "998,1000,1", f"{tmp_path}/q")
    assert not list(tmp_path.glob("q_*"))


def test_data_without_sidecars_is_merged_without_one(tmp_path: Path):
    for name in "ab":
        write_corpus(tmp_path / name, [5, 9], seed=ord(name))
    assert not merge(f"{tmp_path}/out", [f"{tmp_path}/a", f"{tmp_path}/b"]).has_sidecar
    assert not (tmp_path / "out.json").exists()


def other_type(folder: Path, prefixes: list[str]) -> None:
    write_corpus(prefixes[1], [5, 9], dtype=np.int32)
    Path(f"{prefixes[1]}.json").unlink()


def no_sidecar(folder: Path, prefixes: list[str]) -> None:
    Path(f"{prefixes[1]}.json").unlink()


def other_tokenizer(folder: Path, prefixes: list[str]) -> None:
    replace(Sidecar.load(prefixes[1]), tokenizer_fingerprint="huggingface-0").save(prefixes[1])


def other_end(folder: Path, prefixes: list[str]) -> None:
    replace(Sidecar.load(prefixes[1]), append_eod=False).save(prefixes[1])


def damaged(folder: Path, prefixes: list[str]) -> None:
    Path(f"{prefixes[1]}.bin").write_bytes(b"123")


def exists(folder: Path, prefixes: list[str]) -> None:
    (folder / "out.bin").write_bytes(b"mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_type, "hold int32 and uint16"),
        (no_sidecar, r"come from an unknown tokenizer \(no sidecar\) and bytes-"),
        (other_tokenizer, "come from huggingface-0"),
        (other_end, "no end of documents"),
        (damaged, "truncated"),
        (exists, "out: exists"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(prepared, tmp_path: Path, change, message: str):
    change(tmp_path, prepared)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(DataError, match=message):
        merge(f"{tmp_path}/out", prepared)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_index_that_groups_sequences_is_refused(prepared: list[str], tmp_path: Path):
    idx = Path(f"{prepared[1]}.idx")
    idx.write_bytes(idx.read_bytes() + bytes(7))  # a mode for each sequence
    Path(f"{prepared[1]}.json").unlink()
    with pytest.raises(DataError, match="groups sequences into documents, or marks modes"):
        merge(f"{tmp_path}/out", [prepared[1]])


def test_a_failure_leaves_the_old_result(prepared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = f"{tmp_path}/out"
    merge(out, prepared[:1])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_mtp.data.merging.IndexedWriter.write", full)
    with pytest.raises(DataError, match="cannot be written"):
        merge(out, prepared, overwrite=True)
    assert documents(out) == documents(prepared[0])
    assert not list(tmp_path.glob(".out*"))


def test_a_source_is_not_overwritten(prepared: list[str]):
    with pytest.raises(DataError, match="is a source itself"):
        merge(prepared[0], prepared, overwrite=True)
