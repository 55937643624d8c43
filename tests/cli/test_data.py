"""`megatron-mtp data`: what it prints of a sample is what the micro-batch of training holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.looking import DIM, END, Marks, as_text
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
FIELDS = ["model.seq_length=24", "dataset.eod_mask_loss=true", "dataset.reset_attention_mask=true"]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Short documents of bytes; the mask beside them leaves each first word out."""
    texts = [f"word{number} \x1b[31mred\x07 and more" for number in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    [made] = prepare([tmp_path / "in.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1).prefixes
    reader = IndexedReader(made)
    writer = IndexedWriter(f"{made}_mask", np.dtype(np.uint8))
    for length in reader.lengths():
        writer.write(np.arange(length) >= 6, np.array([length]))
    writer.close()
    return made


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["data", *arguments])
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.err
        return shown.out + shown.err

    return run


def micro_batch(prefix: str, sample: int):
    cfg = get_recipe("tiny_dense")
    cfg.dataset.update(mock=False, blend=[prefix], split="1,0,0", eod_mask_loss=True, reset_attention_mask=True)
    cfg.dataset.update(loss_mask_suffix="_mask")
    cfg.model.update(vocab_size=257, seq_length=24)
    cfg.tokenizer.tokenizer_type, cfg.validation.eval_iters = "bytes", 0
    return build_data(cfg.finalize(), DataPlacement(), 2).look(sample)


def test_data_in_object_storage_is_shown_and_checked(prefix: str, call, s3, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for path in Path(prefix).parent.glob("*.*"):
        (s3.place("corpus") / path.name).write_bytes(path.read_bytes())
    there, show = s3.address("corpus/out_text_document"), ["--sample", "3", "--depths", *FIELDS]
    assert call("show", there, *show).replace(there, prefix) == call("show", prefix, *show)
    assert call("info", f"{there}.idx").replace(there, prefix) == call("info", prefix)
    assert call("check", there).replace(there, prefix) == call("check", prefix)
    content = Path(f"{prefix}.bin").read_bytes()
    (s3.place("corpus") / "out_text_document.bin").write_bytes(content[::-1])
    assert f"{there}.bin: its checksum is not the one in" in call("check", there, code=2)
    assert f"{there}x.idx: cannot be read (no such object)" in call("info", f"{there}x", code=2)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("command", [("merge", "all"), ("split",)])
def test_commands_that_write_data_take_no_address(command: tuple[str, ...], call, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "must be a path on a mounted file system" in call(*command, "s3://bucket/web", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sample", [0, 5])
def test_the_table_is_the_micro_batch(prefix: str, call, sample: int):
    out = call("show", prefix, "--sample", str(sample), "--depths", *FIELDS, "dataset.loss_mask_suffix=_mask")
    found, batch, origin = micro_batch(prefix, sample)
    assert origin in out
    counts = [int((batch.loss_mask[depth] != 0).sum()) for depth in range(3)]
    assert f"lm {counts[0]}, mtp_1 {counts[1]}, mtp_2 {counts[2]}" in out
    lines = [line for line in out.splitlines() if line[:4].strip().isdigit()]
    assert len(lines) == 24
    room = (80 - 6) // 4
    for slot, line in enumerate(lines):
        cells = [line[6 + room * column :][:room].strip() for column in range(4)]
        for depth, cell in enumerate(cells[1:]):
            is_beyond = slot + depth + 1 > 24
            assert (cell == ".") == is_beyond
            assert cell.startswith("[-") == (not is_beyond and batch.loss_mask[depth, 0, slot] == 0)
    assert out.count(END) == int(found.starts[1:].sum())
    assert max(map(len, out.splitlines()[2:])) <= 80


def test_text_marks_what_has_no_loss(prefix: str, call):
    out = call("show", prefix, "--sample", "2", *FIELDS, "dataset.loss_mask_suffix=_mask")
    found, batch, _ = micro_batch(prefix, 2)
    marked = "".join(part.partition("-]")[0] for part in out.split("like this-]")[1].split("[-")[1:])
    is_target = np.concatenate([[False], batch.loss_mask[0, 0].numpy() != 0])
    expected = bytes(token for token in found.tokens[~is_target] if token < 256).decode()
    assert marked.replace("\\x1b", "\x1b").replace("\\x07", "\x07") == expected
    assert "\x1b" not in out
    assert "\x07" not in out


def test_colours_are_for_terminals_that_have_them(prefix: str, monkeypatch: pytest.MonkeyPatch):
    class Terminal:
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    found, batch, _ = micro_batch(prefix, 0)
    text = as_text(found, batch, lambda ids: "x" * len(ids), Marks.of(Terminal()))
    assert DIM in text
    assert "[-" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert Marks.of(Terminal()) == Marks.of(sys.stdout) == Marks("[-", "-]")


def test_a_name_that_is_neither_a_recipe_nor_data(call):
    out = call("show", "data/wep_text_document", code=2)
    assert "there is neither a recipe nor data of that name (data/wep_text_document.idx is missing)" in out
    assert "Did you mean tiny_dense" in call("show", "tiny_dens", code=2)


def test_a_recipe_and_ids_without_a_tokenizer(prefix: str, call):
    assert "mock data 'train', sample 7" in call("show", "tiny_dense", "--sample", "7")
    assert "for text add" not in call("show", prefix), "the sidecar names the tokenizer, which needs no file"
    Path(f"{prefix}.json").unlink()
    first = IndexedReader(prefix).read(0)[:3].tolist()
    out = call("show", prefix, "model.seq_length=100")
    told, hint = out.split("like this-]")[1].split("\n\n", 1)[::-1]
    assert hint == "\ntoken ids; for text add tokenizer.tokenizer_type=huggingface tokenizer.tokenizer_model=FILE"
    ids = [word.strip("[-]") for word in told.split()]
    assert str(first[0]) in ids
    assert all(word.isdigit() for word in ids if word not in END.split() and word)


def test_what_a_data_set_holds(prefix: str, call):
    reader = IndexedReader(prefix)
    [row] = json.loads(call("info", f"{prefix}.bin", "--json"))
    lengths = sorted(reader.lengths().tolist())
    assert (row["documents"], row["tokens"], row["dtype"]) == (12, sum(lengths), "uint16")
    assert (row["lengths"]["min"], row["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert row["lengths"]["median"] == lengths[5]
    assert row["tokenizer"].startswith("bytes-")
    text = call("info", prefix, f"{prefix}_mask")
    assert "documents end with 256" in text
    assert "unknown: it has no sidecar" in text
    assert max(map(len, text.splitlines())) <= max(80, len(f"{prefix}_mask"))


def test_merge_split_and_check(prefix: str, call, tmp_path: Path):
    out = str(tmp_path / "twice")
    assert "twice: 12 documents" in call("merge", out, prefix)
    assert "twice_valid: 3 documents" in call("split", f"{out}.idx", "--shares", "9,3,0")
    assert call("check", out, f"{out}_train").count("checksums match") == 2
    assert "--shares = '9,1': must be three shares" in call("split", out, "--shares", "9,1", code=2)
    assert "exists. Choose another name" in call("merge", out, prefix, code=2)
    assert "12 documents" in call("merge", out, prefix, "--overwrite")


def test_ids_are_shown_of_data_whose_tokenizer_is_not_at_hand(tmp_path: Path, call):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "one two three " * 30}) + "\n")
    [prefix] = prepare(
        [tmp_path / "in.jsonl"], tmp_path / "out", PrepareOptions(train_vocab_size=260), workers=1
    ).prefixes
    out = call("show", prefix, "model.seq_length=16")
    assert " ".join(map(str, IndexedReader(prefix).read(0, 1, 16))) in out, "and no id but the stored end ends it"
    settings = "tokenizer.tokenizer_type=huggingface tokenizer.tokenizer_model="
    assert f"token ids; for text add {settings}FILE" in out
    shown = call("show", prefix, "model.seq_length=16", *f"{settings}{tmp_path}/tokenizer.json".split())
    assert "two three one two" in shown
    assert "for text add" not in shown
    refused = call("show", prefix, "model.seq_length=16", "dataset.eod_mask_loss=true", code=2)
    assert "Set tokenizer.tokenizer_type and tokenizer_model to the tokenizer that made the data" in refused
