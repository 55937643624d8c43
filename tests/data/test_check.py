import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_mtp.cli.main import build_app, main
from megatron_mtp.data.check import check_files
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.errors import DataError

pytestmark = pytest.mark.unit


@pytest.fixture
def prefix(tmp_path):
    lines = "".join(json.dumps({"text": f"line {line} " * 5}) + "\n" for line in range(40))
    (tmp_path / "in.jsonl").write_text(lines)
    return prepare([tmp_path / "in.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1).prefixes[0]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change(prefix, **changes):
    path = Path(f"{prefix}.json")
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_changed_token_is_found_by_its_checksum_only(prefix, tmp_path):
    checked = check_files(prefix)
    assert (checked.num_documents, checked.has_checksums) == (40, True)
    assert checked.num_tokens == Sidecar.load(prefix).num_tokens
    flip(tmp_path / "out_text_document.bin", 101)
    IndexedReader(prefix)
    with pytest.raises(DataError, match=r"\.bin: its checksum is not the one in .*\.json"):
        check_files(prefix)


def test_an_index_that_is_damaged_where_nothing_reads_it_has_another_checksum(prefix, tmp_path):
    idx = tmp_path / "out_text_document.idx"
    flip(idx, idx.stat().st_size - 40 * 8)  # entry 1 of the document index: 0, still rising
    IndexedReader(prefix)
    with pytest.raises(DataError, match=r"\.idx: its checksum"):
        check_files(prefix)


def test_a_sidecar_of_an_older_release_has_no_checksums_and_that_is_said(prefix):
    change(prefix, bin_sha256=None, idx_sha256=None)
    assert not check_files(prefix).has_checksums
    result = CliRunner().invoke(build_app("check-data"), ["check-data", prefix])
    assert "40 documents" in result.output
    assert "no checksums were recorded" in result.output
    os.remove(f"{prefix}.json")
    assert not check_files(prefix).has_checksums


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 70000}, r"\.idx: holds uint16 tokens, but .* records int32"),
        ({"num_documents": 41}, r"\.idx: holds 40 documents, but .* records 41"),
        ({"idx_bytes": 7}, r"\.idx: holds \d+ bytes, but .* records 7"),
        ({"num_tokens": "5"}, r"is not a sidecar.*num_tokens is str, not int"),
        ({"append_eod": 1}, r"is not a sidecar.*append_eod is int, not bool"),
        ({"plan": None}, r"is not a sidecar.*plan"),
    ],
)
def test_a_sidecar_of_other_data_is_refused(prefix, changes, text):
    change(prefix, **changes)
    with pytest.raises(DataError, match=text):
        check_files(prefix)


def test_another_token_type_of_the_same_width_is_refused(prefix, tmp_path):
    idx = tmp_path / "out_text_document.idx"
    content = bytearray(idx.read_bytes())
    content[17] = 3  # int16 in place of uint16
    idx.write_bytes(content)
    with pytest.raises(DataError, match=r"holds int16 tokens, but .* records uint16"):
        check_files(prefix)


def test_command_reports_every_data_set_and_ends_with_2(prefix, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check-data", f"{prefix}.bin", f"{prefix}.idx", str(tmp_path / "absent")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out.count("40 documents") == out.count("checksums match") == 1
    assert "absent.idx: cannot be read" in err
