"""--max-tokens keeps a random part of the documents that fits, the same whoever does the work."""

from __future__ import annotations

import json

import pytest

from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.errors import ConfigError

pytestmark = pytest.mark.unit
LONGEST = 40


@pytest.fixture
def inputs(tmp_path):
    """Three files of 100 documents, all different, of up to 40 bytes with their end."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        texts = [f"{number} {line} " + "x" * (line % 30) for line in range(100)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def read(prefixes):
    readers = [IndexedReader(prefix) for prefix in prefixes]
    return [tuple(reader.read(place).tolist()) for reader in readers for place in range(len(reader))]


@pytest.mark.parametrize(("shards", "shuffle"), [(1, None), (1, 7), (3, 7)])
def test_a_budget_is_filled_and_kept(shards, shuffle, inputs, tmp_path):
    options = {"tokenizer": "bytes", "shards": shards, "shuffle": shuffle}
    whole = read(prepare([inputs], tmp_path / "whole", PrepareOptions(**options), workers=1).prefixes)
    budget = sum(map(len, whole)) // 3
    made = prepare([inputs], tmp_path / "part", PrepareOptions(**options, max_tokens=budget), workers=1)
    part = read(made.prefixes)
    assert budget - LONGEST < sum(map(len, part)) <= budget
    assert (made.counts.documents, made.counts.tokens) == (len(part), sum(map(len, part)))
    assert set(part) < set(whole)
    assert len(set(part)) == len(part)
    if shuffle is None:
        assert part == [document for document in whole if document in set(part)], "the order is kept"
    per_file = [sum(document[0] == ord(str(number)) for document in part) for number in range(3)]
    assert min(per_file) > 15, "the documents are drawn from all files, not from the first"
    again = prepare([inputs], tmp_path / "again", PrepareOptions(**options, max_tokens=budget), workers=3)
    assert read(again.prefixes) == part
    assert prepare([inputs], tmp_path / "part", PrepareOptions(**options, max_tokens=budget)).was_done


def test_a_budget_above_all_tokens_keeps_every_document(inputs, tmp_path):
    whole = prepare([inputs], tmp_path / "whole", PrepareOptions(tokenizer="bytes"), workers=1)
    same = prepare([inputs], tmp_path / "same", PrepareOptions(tokenizer="bytes", max_tokens=10**12), workers=1)
    assert read(whole.prefixes) == read(same.prefixes)


def test_a_budget_below_every_document_is_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"--max-tokens = 2: is below the first of the documents"):
        prepare([inputs], tmp_path / "part", PrepareOptions(tokenizer="bytes", max_tokens=2), workers=1)
    with pytest.raises(ConfigError, match="--max-tokens"):
        PrepareOptions(tokenizer="bytes", max_tokens=0)
