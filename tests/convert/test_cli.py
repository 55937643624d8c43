"""The commands: there and back, a difference is exit code 1, a mistake one message and exit code 2."""

from __future__ import annotations

import json

import pytest
import safetensors.torch

from megatron_mtp.cli.main import main
from tests.convert.hf_models import make
from tests.convert.mtp_forms import add_depths

pytestmark = pytest.mark.unit


def run(*arguments) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, arguments)])
    return int(end.value.code or 0)


def test_import_export_check(tmp_path, capsys):
    model = make("glm4_moe", tmp_path / "hf")
    add_depths(model, tmp_path / "hf", "deepseek", 1, "num_nextn_predict_layers")
    assert run("import", tmp_path / "hf", tmp_path / "run", "--report", tmp_path / "report.json") == 0
    assert run("export", tmp_path / "run", tmp_path / "back", "--no-mtp-duplicates") == 0
    assert run("check", tmp_path / "run", tmp_path / "back") == 0
    assert run("check", tmp_path / "run", tmp_path / "hf") == 0  # with the duplicates
    printed = capsys.readouterr().out
    assert "glm4_moe: " in printed
    assert "0 are not" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["duplicated"]) == 2
    accounted = {*report["read"], *report["duplicated"]}
    path = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert accounted == tensors.keys()

    tensors["model.norm.weight"][0] += 1
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert run("check", tmp_path / "run", tmp_path / "hf") == 1
    assert "model.norm.weight: differs by up to 1" in capsys.readouterr().out


def test_depths_that_are_left_out_are_named(tmp_path, capsys):
    model = make("mimo", tmp_path / "hf")
    add_depths(model, tmp_path / "hf", "mimo", 2, "num_nextn_predict_layers")
    assert (
        run("import", tmp_path / "hf", tmp_path / "run", "--mtp-depths", 1, "--report", tmp_path / "report.json") == 0
    )
    left_out = json.loads((tmp_path / "report.json").read_text())["left_out"]
    assert left_out
    assert all(name.startswith("model.mtp_layers.1.") for name in left_out)
    assert "left out" in capsys.readouterr().out


def test_mistakes_are_one_message(tmp_path, capsys):
    make("qwen3", tmp_path / "hf")
    assert run("export", tmp_path / "nothing", tmp_path / "out") == 2
    assert run("import", tmp_path / "nothing", tmp_path / "out") == 2
    assert run("import", tmp_path / "hf", tmp_path / "out", "--recipe", "tiny_dens") == 2
    assert run("import", tmp_path / "hf", tmp_path / "out", "--mtp-depths", 1) == 2
    errors = capsys.readouterr().err
    assert "Did you mean tiny_dense" in errors
    assert "--mtp-init" in errors
    assert "Traceback" not in errors
