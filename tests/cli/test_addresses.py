"""No command takes s3://bucket/run for a local folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.cli.addresses import TEXT_PATHS
from megatron_mtp.cli.main import COMMANDS, build_app, main
from megatron_mtp.errors import CheckpointError

pytestmark = pytest.mark.unit

# Parameters whose text is no path of data or checkpoints; everything else must refuse an address.
NO_PATHS = set(
    """account after assume callback claim compare container_image container_mounts env family hardware image
    json_key layouts max_tokens namespace node_selector num_draft overrides partition phase prompt prompt_ids
    pull_secret recipe resource sbatch secret shares srun stop time tokens tree words""".split()
)


def parameters(name: str):
    """(words that choose the command, parameter) of one command and its subcommands."""

    def walk(words, command):
        for parameter in command.params:
            yield words, parameter
        for sub, inner in getattr(command, "commands", {}).items():
            yield from walk([*words, sub], inner)

    yield from walk([name], typer.main.get_command(build_app(name)).commands[name])


def is_text(parameter) -> bool:
    kind = str(getattr(parameter, "type_descriptor", None) and parameter.type_descriptor.annotation)
    return kind in ("<class 'str'>", "list[str]", "<class 'pathlib.Path'>", "list[pathlib.Path]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_text_parameter_is_known_as_a_path_or_as_none(name):
    texts = {
        parameter.name: parameter.type_descriptor.annotation for _, parameter in parameters(name) if is_text(parameter)
    }
    unknown = {n for n, kind in texts.items() if "Path" not in str(kind)} - TEXT_PATHS - NO_PATHS
    assert not unknown, "say in cli/addresses.py whether it is a path"


CALLS = {
    "checkpoint": ("checkpoint", "list", "s3://bucket/run"),
    "verify": ("checkpoint", "verify", "gs://bucket/run@200"),
    "average": ("checkpoint", "average", "runs/a@1", "runs/a@2", "-o", "s3://bucket/run"),
    "import": ("convert", "import", "here", "s3://bucket/run"),
    "export": ("convert", "export", "s3://bucket/run", "there"),
    "export to": ("convert", "export", "runs/mine", "s3://bucket/run"),
    "prepare": ("prepare", "hdfs://host/text", "--output", "data/web", "--tokenizer", "bytes"),
    "prepare to": ("prepare", "text.jsonl", "--output", "s3://bucket/web", "--tokenizer", "bytes"),
    "tokenizer": ("prepare", "text.jsonl", "--output", "data/web", "--tokenizer", "https://host/tokenizer.json"),
    "data": ("data", "info", "hdfs://bucket/web"),
    "show": ("data", "show", "https://host/web"),
    "merge": ("data", "merge", "s3://bucket/all", "data/a", "data/b"),
    "split": ("data", "split", "s3://bucket/all"),
    "check-data": ("check-data", "ftp://bucket/web"),
    "evaluate": ("evaluate", "s3://bucket/run"),
    "evaluate on": ("evaluate", "runs/mine", "--set", "web=s3://bucket/web"),
    "generate": ("generate", "s3://bucket/run", "--prompt", "x"),
    "spec-eval": ("spec-eval", "runs/mine", "--data", "s3://bucket/held_out.jsonl"),
    "new": ("new", "s3://bucket/project"),
    "field": ("show", "tiny_dense", "checkpoint.save=s3://bucket/run"),
    "blend": ("show", "tiny_dense", "dataset.blend=[hdfs://bucket/web]"),
    "config": ("show", "tiny_dense", "--config", "https://host/run.yaml"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_address_is_refused_by_name(call, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(list(CALLS[call]))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "://" in error
    assert "must be a path on a mounted file system" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["s3://bucket/run", Path("s3://bucket/run"), "memory://run"])
def test_a_run_directory_is_no_address(path):
    with pytest.raises(CheckpointError, match="mounted file system"):
        RunDirectory(path)
