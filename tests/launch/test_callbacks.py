"""Callbacks of one's own travel with a job: by their absolute paths, and as files of a pod."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mtp.cli.main import main

pytestmark = pytest.mark.unit
MINE = """\
from megatron_mtp.training.callbacks import Callback

class Mine(Callback):
    pass
"""
SHARED = ["dataset.mock=true", "checkpoint.save=/shared/run", "checkpoint.load=/shared/run"]
OPTIONS = ["--gpus-per-node", "1", "--dry-run", *SHARED, "--callback"]


@pytest.fixture
def folder(own_folder: Path) -> Path:
    (own_folder / "mine.py").write_text(MINE)
    return own_folder


def launched(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["launch", *arguments])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    return shown.out


@pytest.mark.parametrize("where", ["local", "slurm"])
def test_a_job_names_their_files_absolutely(folder: Path, capsys: pytest.CaptureFixture[str], where: str):
    text = launched(capsys, where, "tiny_dense", *OPTIONS, "mine.py:Mine")
    assert f'train.callbacks=["{folder}/mine.py:Mine"]' in text


def test_a_pod_gets_their_files(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = launched(capsys, "k8s", "tiny_dense", "--image", "image", "--claim", "disk", *OPTIONS, "mine.py:Mine")
    parts = {part["kind"]: part for part in yaml.safe_load_all(text)}
    (name,) = parts["ConfigMap"]["data"]
    assert parts["ConfigMap"]["data"][name] == MINE
    pod = parts["Job"]["spec"]["template"]["spec"]
    (place,) = (mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "config")
    assert f'train.callbacks=["{place}/{name}:Mine"]' in pod["containers"][0]["command"][-1]


def test_a_callback_that_is_none_is_refused_before_the_job_is_made(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["launch", "slurm", "tiny_dense", *OPTIONS, "mine.py:Other"])
    assert end.value.code == 2
    assert "train.callbacks = 'mine.py:Other': mine.py has no class 'Other'" in capsys.readouterr().err
