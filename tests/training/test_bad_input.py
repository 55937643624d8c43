"""Bad data and bad directories: exit code 2, one message that names the thing, nothing written, no process group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.data.indexed import IndexedWriter

pytestmark = pytest.mark.unit


def good(folder: Path) -> Path:
    """A data set of the right vocabulary, as `prepare` leaves it but without a sidecar."""
    prefix = folder / "train_text_document"
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    writer.write((np.arange(4000) % 500).astype(np.uint16), np.array([1000] * 4))
    writer.close()
    return prefix


def missing(prefix: Path) -> None:
    prefix.with_name(prefix.name + ".idx").unlink()


def empty(prefix: Path) -> None:
    prefix.with_name(prefix.name + ".bin").write_bytes(b"")


def truncated_bin(prefix: Path) -> None:
    path = prefix.with_name(prefix.name + ".bin")
    os.truncate(path, path.stat().st_size - 10)


def truncated_idx(prefix: Path) -> None:
    path = prefix.with_name(prefix.name + ".idx")
    os.truncate(path, path.stat().st_size - 3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(missing, ".idx"), (empty, ".bin"), (truncated_bin, ".bin"), (truncated_idx, ".idx")],
)
@pytest.mark.parametrize("ranks", [[], ["--nproc", "2"]], ids=["", "nproc"])
def test_damaged_data(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: str,
    ranks: list[str],
):
    prefix = good(tmp_path)
    damage(prefix)
    text = refused(tmp_path, capfd, prefix, ranks)
    assert f"train_text_document{words}" in text


@pytest.mark.parametrize(
    ("field", "value", "words"), [("largest_id", 700, "700"), ("fingerprint", "other", "tokenizer")]
)
def test_the_sidecar_is_believed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], field: str, value: object, words: str
):
    from megatron_mtp.data.prepare.run import PrepareOptions, prepare

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a line of text, again and again " * 20}) + "\n" for _ in range(20)))
    prefix = Path(prepare([text], tmp_path / "train", PrepareOptions(tokenizer="bytes"), workers=1).prefixes[0])
    sidecar = prefix.with_name(prefix.name + ".json")
    record = json.loads(sidecar.read_text())
    names = [name for name in record if field in name]
    assert names, f"the sidecar has no {field}: {sorted(record)}"
    sidecar.write_text(json.dumps({**record, names[0]: value}))
    assert words in refused(tmp_path, capfd, prefix, [], "tokenizer.tokenizer_type=bytes", "model.vocab_size=512")


def test_a_directory_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    text = refused(tmp_path, capfd, good(tmp_path), [], f"checkpoint.save={tmp_path / 'file' / 'run'}")
    assert "checkpoint.save" in text


def refused(folder: Path, capfd: pytest.CaptureFixture[str], prefix: Path, ranks: list[str], *overrides: str) -> str:
    """Runs `pretrain tiny_dense` on the data, checks that it is refused in the proper form, and returns the message."""
    before = sorted(folder.rglob("*"))
    arguments = [
        "pretrain", "tiny_dense", *ranks, "dataset.mock=false", f"dataset.blend=[{prefix}]", "dataset.split='1,0,0'",
        f"dataset.path_to_cache={folder / 'cache'}", "validation.eval_iters=0", "dist.device=cpu",
        f"logger.log_dir={folder / 'logs'}", *overrides,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capfd.readouterr()
    assert end.value.code == 2
    assert "Traceback" not in said.err + said.out
    assert sorted(folder.rglob("*")) == before
    return said.err
