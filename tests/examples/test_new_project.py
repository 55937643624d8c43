"""`megatron-mtp new`: what it refuses, and that each command of the README that it writes works."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.errors import ConfigError
from megatron_mtp.examples.new_project import FILES, PLACEHOLDER, TEMPLATE, new_project
from megatron_mtp.observe.jsonl import read_metrics
from tests.docs.test_commands import commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory; what importing files from it changes is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("megatron_mtp_own"):
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    return printed.out


@pytest.mark.unit
@pytest.mark.parametrize("name", ["1a", "a-b", "a/b", "class", "", ".", "größe"])
def test_a_name_that_is_no_function_is_refused(folder: Path, name: str):
    with pytest.raises(ConfigError, match="is the name of a Python function"):
        new_project(name, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.unit
def test_a_folder_that_holds_something_is_refused(folder: Path):
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("")
    (folder / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"NAME = '{name}': .* exists and is not an empty folder"):
            new_project(name, folder)
    assert [path.name for path in (folder / "mine").iterdir()] == ["notes.txt"]
    (folder / "empty").mkdir()
    assert [path.name for path in new_project("empty", folder)] == list(FILES)


@pytest.mark.unit
def test_every_file_of_the_template_is_written_under_the_name(folder: Path):
    files = new_project("demo1", folder)
    assert {path.name for path in files} == {path.name for path in TEMPLATE.iterdir() if path.is_file()}
    for path in files:
        assert PLACEHOLDER not in path.read_text()
        assert "demo1" in path.read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_the_commands_of_its_readme_work(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    run(capsys, ["new", "demo1"])
    monkeypatch.chdir(folder / "demo1")
    printed = {}
    for line, _ in commands(Path("README.md").read_text()):
        program, *words = shlex.split(line)
        assert program == "megatron-mtp"
        printed[words[0]] = run(capsys, words)
    assert set(printed) == {"show", "pretrain", "evaluate", "checkpoint", "convert", "launch"}
    assert "model.num_layers: 4 -> 6" in printed["show"]
    assert "| mtp_1/gap: " in printed["pretrain"]
    steps = read_metrics("runs/demo1.metrics.jsonl")
    assert steps[-1]["lm loss"] < steps[0]["lm loss"] - 0.5
    assert "mtp_1 loss" in printed["evaluate"]
    assert Path("hf/model.safetensors").exists()
    assert "callbacks.py:Progress" in printed["launch"]
    assert f"{folder}/demo1/recipe.py:demo1" in printed["launch"]
