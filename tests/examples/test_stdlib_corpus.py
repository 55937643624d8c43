import json

import pytest

from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl

pytestmark = pytest.mark.unit


def test_standard_library_is_split_without_overlap_and_the_same_each_time(tmp_path):
    parts = stdlib_jsonl(tmp_path / "a")
    train, valid = ([json.loads(line) for line in path.read_text().splitlines()] for path in parts)
    assert len(train) > 300
    assert 5 < len(valid) < len(train) / 8
    paths = [item["path"] for item in train + valid]
    assert len(set(paths)) == len(paths)
    assert not {item["text"] for item in train} & {item["text"] for item in valid}
    assert "argparse.py" in paths
    assert not any("site-packages" in path or "/test/" in path for path in paths)
    size = sum(len(item["text"]) for item in train)
    assert size > 5_000_000
    for again, first in zip(stdlib_jsonl(tmp_path / "b"), parts, strict=True):
        assert again.read_bytes() == first.read_bytes()
