"""Tokenizers come along on import and export, and are kept with a run, so that their first path may vanish."""

from __future__ import annotations

import base64
import json
import os
import shutil

import pytest

from megatron_mtp.checkpoint.kept_files import keep_with_run, kept_folder, tokenizer_of
from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.cli.main import main
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.errors import CheckpointError, DataError
from megatron_mtp.recipes import get_recipe
from tests.convert.hf_models import make
from tests.convert.mtp_forms import edit_config

pytestmark = pytest.mark.unit

CODE = "raise SystemExit('code of a model folder was executed')\n"
KIMI = ("tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def kimi(tmp_path):
    """A folder as Moonlight's and Kimi-K2's: a tiktoken file, the code that reads it, and no tokenizer.json."""
    folder = tmp_path / "hf"
    make("moonlight", folder)
    ranks = "\n".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(90))
    (folder / "tiktoken.model").write_text(ranks)
    (folder / "tokenization_kimi.py").write_text(CODE)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    auto_map = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "eos_token": "[EOS]"}))
    edit_config(folder, eos_token_id=[91, 92])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [93]}))
    return folder


def run(*arguments) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return int(end.value.code or 0)


def test_a_tokenizer_that_needs_code_comes_along(kimi, tmp_path, capsys):
    report = import_hf(kimi, tmp_path / "start")
    assert {f"hf/{name}" for name in KIMI} <= set(report.files)
    (note,) = report.notes
    assert "tiktoken.model and no tokenizer.json" in note
    assert "tokenization_kimi.py" in note
    # A run that starts from it keeps the files too, and so does its export.
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.pretrained_checkpoint = str(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "run", ignore=shutil.ignore_patterns("hf"))
    assert set(KIMI) <= set(keep_with_run(cfg, tmp_path / "run"))
    shutil.rmtree(tmp_path / "start")
    report = export_hf(tmp_path / "run", tmp_path / "back")
    assert set(KIMI) <= set(report.files)
    assert any("trust_remote_code" in note for note in report.notes)
    for name in KIMI:
        assert (tmp_path / "back" / name).read_bytes() == (kimi / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [91, 92]

    arguments = ["--device", "cpu", "--num-draft", "0", "--max-new-tokens", "3", "--json"]
    for source in (tmp_path / "run", kimi):
        assert run("generate", source, "--prompt", "abc", *arguments) == 2
        error = capsys.readouterr().err
        assert "tokenization_kimi.py" in error
        assert "--prompt-ids" in error
        assert run("generate", source, "--prompt-ids", "1,2,3", *arguments) == 0
        assert len(json.loads(capsys.readouterr().out)["rows"][0]["tokens"]) == 3


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    make("qwen3", tmp_path / "hf")
    assert "has no tokenizer" in import_hf(tmp_path / "hf", tmp_path / "run").notes[0]
    assert any("No tokenizer was written" in note for note in export_hf(tmp_path / "run", tmp_path / "back").notes)
    quiet = export_hf(tmp_path / "run", tmp_path / "quiet", with_tokenizer=False)
    assert not any("tokenizer" in note for note in quiet.notes)


@pytest.fixture
def data(tmp_path):
    """A trained tokenizer, and files of other kinds."""
    folder = tmp_path / "data"
    folder.mkdir()
    train_bpe(["def f(x):\n    return x + 1\n"] * 3, 280, folder / "tokenizer.json")
    ranks = [bytes([byte]) for byte in range(256)]
    lines = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
    (folder / "r.tiktoken").write_text(lines)
    shutil.copyfile(folder / "tokenizer.json", folder / "bpe.json")
    return folder


@pytest.mark.parametrize(
    ("kind", "name", "kept"),
    [
        ("huggingface", "tokenizer.json", "tokenizer.json"),
        ("huggingface", "", "tokenizer.json"),
        ("huggingface", "bpe.json", "tokenizer.json"),
        ("tiktoken", "r.tiktoken", "r.tiktoken"),
    ],
)
def test_a_run_keeps_its_tokenizer(kind, name, kept, data, tmp_path, monkeypatch):
    """Relative to the folder of the training, as in the demo; then from another folder, and after the path is gone."""
    (data / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    monkeypatch.chdir(tmp_path)
    cfg = get_recipe("tiny_dense")
    cfg.tokenizer.update(tokenizer_type=kind, tokenizer_model=os.path.join("data", name))
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    fingerprint = tokenizer_fingerprint(cfg)
    names = keep_with_run(cfg, run_directory)
    assert kept in names
    assert ("tokenizer_config.json" in names) == (kind == "huggingface")
    checkpoint = run_directory / "iter_0000001"
    monkeypatch.chdir("/")
    shutil.rmtree(data)
    found = tokenizer_of(cfg, checkpoint, fingerprint)
    assert found.decode(found.encode_batch(["f(x)"])[0]) == "f(x)"
    # A file that was changed is refused, and an older run, without kept files, uses the path in its config.
    file = run_directory / "hf" / kept
    changed = file.read_text().replace("<|endoftext|>", "</s>") if kind == "huggingface" else file.read_text()[:-9]
    file.write_text(changed)
    with pytest.raises(CheckpointError, match="is another tokenizer"):
        tokenizer_of(cfg, checkpoint, fingerprint)
    shutil.rmtree(run_directory / "hf")
    with pytest.raises(DataError, match="data"):
        tokenizer_of(cfg, checkpoint, fingerprint)


def test_another_tokenizer_replaces_that_of_the_imported_model(kimi, data, tmp_path):
    import_hf(kimi, tmp_path / "start")
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.pretrained_checkpoint = str(tmp_path / "start")
    cfg.tokenizer.update(tokenizer_type="huggingface", tokenizer_model=str(data / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    assert keep_with_run(cfg, tmp_path / "run") == ["config.json", "generation_config.json", "tokenizer.json"]


def test_an_export_from_another_folder(data, tmp_path, monkeypatch):
    """An imported model's run directory is moved, and its source is removed."""
    from transformers import AutoTokenizer

    make("qwen3", tmp_path / "hf", vocab_size=288)
    shutil.copyfile(data / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    assert not any("tokenizer" in note for note in import_hf(tmp_path / "hf", tmp_path / "run").notes)
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    report = export_hf(tmp_path / "moved", tmp_path / "back")
    assert "tokenizer.json" in report.files
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("f(x)").input_ids
    assert StoredWeights(tmp_path / "moved").config().tokenizer.tokenizer_type == "huggingface"


def test_a_run_on_object_storage_keeps_its_tokenizer(data, tmp_path, s3):
    cfg = get_recipe("tiny_dense")
    cfg.tokenizer.update(tokenizer_type="huggingface", tokenizer_model=str(data))
    fingerprint = tokenizer_fingerprint(cfg)
    assert keep_with_run(cfg, s3.place()) == ["tokenizer.json"]
    shutil.rmtree(data)
    checkpoint = s3.place() / "iter_0000001"
    found = tokenizer_of(cfg, checkpoint, fingerprint)
    assert found.decode(found.encode_batch(["f(x)"])[0]) == "f(x)"
    assert kept_folder(checkpoint) == kept_folder(checkpoint), "one copy for each process"
    assert kept_folder(s3.place("other") / "iter_0000001") is None
