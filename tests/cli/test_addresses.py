"""No command takes s3://bucket/run for a local folder, and no unknown kind of storage is taken at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.cli.addresses import TEXT_PATHS
from megatron_mtp.cli.main import COMMANDS, build_app, main
from megatron_mtp.errors import ConfigError

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
    "checkpoint": ("checkpoint", "list", "hdfs://host/run"),
    "verify": ("checkpoint", "verify", "hdfs://host/run@200"),
    "average": ("checkpoint", "average", "runs/a@1", "runs/a@2", "-o", "hdfs://host/run"),
    "import": ("convert", "import", "here", "s3://bucket/run"),
    "export": ("convert", "export", "hdfs://host/run", "there"),
    "export to": ("convert", "export", "runs/mine", "s3://bucket/run"),
    "prepare": ("prepare", "hdfs://host/text", "--output", "data/web", "--tokenizer", "bytes"),
    "prepare to": ("prepare", "text.jsonl", "--output", "s3://bucket/web", "--tokenizer", "bytes"),
    "tokenizer": ("prepare", "text.jsonl", "--output", "data/web", "--tokenizer", "https://host/tokenizer.json"),
    "data": ("data", "info", "hdfs://bucket/web"),
    "show": ("data", "show", "https://host/web"),
    "merge": ("data", "merge", "s3://bucket/all", "data/a", "data/b"),
    "split": ("data", "split", "s3://bucket/all"),
    "check-data": ("check-data", "ftp://bucket/web"),
    "evaluate": ("evaluate", "hdfs://host/run"),
    "evaluate on": ("evaluate", "runs/mine", "--set", "web=hdfs://bucket/web"),
    "generate": ("generate", "hdfs://host/run", "--prompt", "x"),
    "spec-eval": ("spec-eval", "runs/mine", "--data", "s3://bucket/held_out.jsonl"),
    "new": ("new", "s3://bucket/project"),
    "field": ("show", "tiny_dense", "checkpoint.save=hdfs://host/run"),
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


@pytest.mark.parametrize("field", ["checkpoint.save", "checkpoint.load", "checkpoint.pretrained_checkpoint"])
def test_fields_that_take_addresses_say_which(field, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["show", "tiny_dense", f"{field}=s3://bucket/run", "logger.log_dir=logs"])
    assert caught.value.code == 0
    assert "s3://bucket/run" in capsys.readouterr().out
    for wrong, rule in (
        ("s3://bucket", "must name a bucket and a folder"),
        ("ftp://host/run", "unknown kind of storage"),
    ):
        with pytest.raises(SystemExit):
            main(["show", "tiny_dense", f"{field}={wrong}", "logger.log_dir=logs"])
        assert rule in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_is_a_message(s3, capsys):
    for words in (["checkpoint", "show"], ["checkpoint", "verify"], ["evaluate"], ["convert", "check"]):
        rest = ["there"] if words[0] == "convert" else []
        with pytest.raises(SystemExit) as caught:
            main([*words, "s3://no-such-bucket/run", *rest])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "there is no bucket 'no-such-bucket'" in error
        assert "Traceback" not in error


@pytest.mark.parametrize("path", ["hdfs://host/run", Path("ftp://host/run")])
def test_a_run_directory_is_of_a_known_kind(path):
    with pytest.raises(ConfigError, match="mounted file system"):
        RunDirectory(path)


def test_a_job_saves_to_an_address(capsys):
    job = ["launch", "slurm", "tiny_dense", "--nodes", "2", "--gpus-per-node", "2", "--dry-run", "dataset.mock=true"]
    job += ["checkpoint.save=s3://bucket/run", "checkpoint.load=s3://bucket/run"]
    with pytest.raises(SystemExit) as caught:
        main([*job, "logger.log_dir=/shared/logs"])
    shown = capsys.readouterr()
    assert not caught.value.code, shown.err
    assert "checkpoint.save=s3://bucket/run" in shown.out
    with pytest.raises(SystemExit):
        main(job)
    assert capsys.readouterr().err.startswith("megatron-mtp: logger.log_dir = None: must name a folder")
