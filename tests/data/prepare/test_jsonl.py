import gzip
import json
import os

import pytest
import zstandard

from megatron_mtp.data.prepare.jsonl import list_inputs, read_documents
from megatron_mtp.errors import DataError

pytestmark = pytest.mark.unit
LINES = '{"text": "one"}\n\n  \n{"text": "zw\\u00f6lf", "id": 3}\n{"id": 1, "text": ""}'


def read(path, **options):
    return [(document.line, document.text) for document in read_documents(path, **options)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_compression_reads_the_same(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pack = {
        "jsonl": bytes,
        "jsonl.gz": lambda b: gzip.compress(b[:20]) + gzip.compress(b[20:]),  # several members, as pigz writes
        "jsonl.zst": lambda b: zstandard.compress(b[:20]) + zstandard.compress(b[20:]),
    }[ending]
    path.write_bytes(pack(LINES.encode()))
    assert read(path) == [(1, "one"), (4, "zwölf"), (5, "")]
    reported = []
    read(path, on_progress=reported.append)
    assert sum(reported) == path.stat().st_size


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
def test_truncated_archives_are_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    content = json.dumps({"text": os.urandom(200_000).hex()}).encode() + b"\n"
    complete = (gzip.compress if ending.endswith("gz") else zstandard.compress)(content * 3)
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(DataError, match=rf"a\.{ending}: cannot be read to its end.*truncated"):
        read(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=rf"a\.{ending}: cannot be read to its end"):
        read(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "is not JSON"),
        ("[1]", "is not an object with the key 'text'"),
        ('{"body": "a"}', "is not an object with the key 'text'"),
        ('{"text": null}', "its 'text' is NoneType"),
        ('{"text": 5}', "its 'text' is int"),
    ],
)
def test_malformed_lines_are_named_or_counted(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "after"}}\n')
    with pytest.raises(DataError) as info:
        read(path)
    assert str(info.value).startswith(f"{path}:2: {problem}")
    bad = []
    assert read(path, on_bad_line=bad.append) == [(1, "fine"), (3, "after")]
    assert len(bad) == 1
    assert bad[0].startswith(f"{path}:2: {problem}")


def test_bytes_that_are_not_utf8_and_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=":1: is not JSON"):
        read(path)
    path.write_bytes(b'{"text": "x\\ud800y \\ud83d\\ude00"}\n')
    assert read(path) == [(1, "x\ufffdy \U0001f600")]


def test_another_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "b"}')
    assert read(path, key="body") == [(1, "b")]


def test_inputs_are_files_and_folders(tmp_path):
    for name in ("b/2.jsonl", "b/c/1.jsonl.zst", "b/a.jsonl.gz", "b/notes.txt", "z.jsonl", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list_inputs([tmp_path / "z.jsonl", tmp_path / "b"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["z.jsonl", "b/2.jsonl", "b/a.jsonl.gz", "b/c/1.jsonl.zst"]
    for wrong, message in [("no", "no such file"), ("x.txt", "has another format"), ("empty", "holds no file")]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            list_inputs([tmp_path / wrong])
    with pytest.raises(DataError, match="given more than once"):
        list_inputs([tmp_path / "b", tmp_path / "b" / "2.jsonl"])
