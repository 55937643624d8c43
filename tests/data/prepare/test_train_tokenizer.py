"""`megatron-mtp train-tokenizer`: the tokenizer of `prepare --train-tokenizer`, without data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.tokenizer import open_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(2):
        texts = [f"sentence {number} of part {part}, and again sentence {number}" for number in range(40)]
        lines = (json.dumps({"text": text, "body": text.upper()}) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train-tokenizer", *map(str, arguments)])
    shown = capsys.readouterr()
    assert (end.value.code or 0) == code, shown.err
    return shown.out + shown.err


def test_it_is_the_one_that_prepare_trains_and_several_data_sets_share_it(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = inputs / "tok" / "tokenizer.json"  # a new folder; no input, though it lies among them
    said = call(capsys, inputs, "-o", file, "--vocab-size", 280)
    found = open_tokenizer("huggingface", str(file))
    assert said == f"{file}: 280 ids, documents end with id 0, {found.fingerprint()}\n"
    options = PrepareOptions(tokenizer=str(tmp_path / "other.json"), train_vocab_size=280)
    prepare([inputs / "0.jsonl", inputs / "1.jsonl"], tmp_path / "out", options, workers=1)
    assert (tmp_path / "other.json").read_bytes() == file.read_bytes()
    made = [
        prepare([inputs / f"{part}.jsonl"], tmp_path / f"p{part}", PrepareOptions(tokenizer=str(file)), workers=1)
        for part in range(2)
    ]
    assert [one.vocab_size for one in made] == [280, 280]


def test_a_sample_of_another_field_and_fewer_merges_than_asked_for(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "t.json"
    said = call(capsys, inputs, "-o", file, "--vocab-size", 100_000, "--json-key", "body", "--sample-mb", 1)
    size = open_tokenizer("huggingface", str(file)).vocab_size
    assert 257 < size < 100_000
    assert f"{size:,} ids" in said
    encoded = [len(ids) for ids in open_tokenizer("huggingface", str(file)).encode_batch(["SENTENCE", "sentence"])]
    assert encoded == [1, 8]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vocab-size", "256"], "--vocab-size = 256: must be from 257 to 1,048,576"),
        (["--vocab-size", "300", "-o", "t.bin"], "--output = 't.bin': must end in .json"),
        (["--vocab-size", "300", "--json-key", "absent"], "is not an object with the key 'absent'"),
        (["--vocab-size", "300", "--json-key", "absent", "--skip-bad-lines"], "no line holds a text to train"),
        (["--vocab-size", "300", "-o", "{inputs}/0.jsonl/t.json"], "cannot be written"),
    ],
)
def test_mistakes(inputs: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    given = [option.format(inputs=inputs) for option in options]
    assert said in call(capsys, inputs, "-o", tmp_path / "t.json", *given, code=2)
    assert not (tmp_path / "t.json").exists()


def test_a_file_that_exists_is_kept(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.json").write_text("mine")
    said = call(capsys, inputs, "-o", tmp_path / "t.json", "--vocab-size", 300, code=2)
    assert "t.json: exists" in said
    assert (tmp_path / "t.json").read_text() == "mine"
    call(capsys, inputs, "-o", tmp_path / "t.json", "--vocab-size", 300, "--overwrite")
    assert (tmp_path / "t.json").read_text() != "mine"
