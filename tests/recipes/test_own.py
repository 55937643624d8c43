"""Recipes of one's own, as module:function and as file.py:function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mtp.cli.main import main
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
WEEK = """\
from megatron_mtp.recipes import get_recipe
import beside

CALLS = []

def week_config():
    cfg = get_recipe("tiny_dense")
    cfg.model.num_layers = beside.LAYERS
    CALLS.append(1)
    return cfg

def half_done():
    return get_recipe("tiny_dense").finalize()

def other_kind():
    return {}

def failing():
    return undefined_name

def wrong_field():
    cfg = get_recipe("tiny_dense")
    cfg.model.num_layerz = 3

def wrong_update():
    get_recipe("tiny_dense").model.update(num_layerz=3)

def unknown():
    return get_recipe("tiny_dens")

def through_another():
    return get_recipe("rec/week.py:wrong_update")
"""


@pytest.fixture
def folder(own_folder: Path) -> Path:
    """A working directory with a recipe."""
    (own_folder / "rec").mkdir()
    (own_folder / "rec/week.py").write_text(WEEK)
    (own_folder / "rec/beside.py").write_text("LAYERS = 6\n")
    (own_folder / "rec/broken.py").write_text("def f(:\n")
    return own_folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert not end.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_file_and_a_module_give_fresh_configs(folder: Path):
    for name in ("rec/week.py:week_config", f"{folder}/rec/week.py:week_config", "rec.week:week_config"):
        first, second = get_recipe(name), get_recipe(name)
        assert first.model.num_layers == 6
        assert first == second
        assert first is not second


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rec/weak.py:week_config", "recipe rec/weak.py:week_config: there is no file rec/weak.py"),
        ("rec/week.py", "must be module:function or path/file.py:function"),
        ("rec/week.py:", "must be module:function or path/file.py:function"),
        (":week_config", "must be module:function or path/file.py:function"),
        ("rec/week.py:weak_config", "has no function 'weak_config'. Did you mean week_config?"),
        ("rec.weak:week_config", "there is no module 'rec.weak' in the working directory"),
        ("rec.week.deep:f", "there is no module 'rec.week.deep'"),
        ("rec/broken.py:f", "rec/broken.py:1: SyntaxError"),
        ("rec/week.py:failing", "rec/week.py:19, in failing: NameError: name 'undefined_name' is not defined"),
        ("rec/week.py:wrong_field", "rec/week.py:23: model.num_layerz: there is no such field"),
        ("rec/week.py:wrong_update", "rec/week.py:26: model.num_layerz: there is no such field"),
        ("rec/week.py:unknown", "rec/week.py:29: There is no recipe 'tiny_dens'"),
        ("rec/week.py:half_done", "must return a config that is not finalized"),
        ("rec/week.py:other_kind", "must return a ConfigContainer, not dict"),
        ("rec/week.py:CALLS", "has no function 'CALLS'"),
    ],
)
def test_what_is_wrong_with_it_is_said_in_one_line(folder: Path, name: str, message: str):
    with pytest.raises(ConfigError) as error:
        get_recipe(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_recipe_that_another_calls_names_both_lines(folder: Path):
    with pytest.raises(ConfigError, match=r"rec/week\.py:32: \S*rec/week\.py:26: model\.num_layerz"):
        get_recipe("rec/week.py:through_another")


def test_every_command_takes_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    name = "rec/week.py:week_config"
    assert "# recipe      rec/week.py:week_config" in run(capsys, "show", name)
    assert "model.num_layers: 6 -> 7" in run(capsys, "show", name, "model.num_layers=7", "--diff")
    assert name in run(capsys, "plan", name, "--devices", "2")
    checkpoint = ["checkpoint.save=/shared/run", "checkpoint.load=/shared/run", "dataset.mock=true"]
    script = run(capsys, "launch", "slurm", name, "--gpus-per-node", "1", "--dry-run", *checkpoint)
    assert f"pretrain {folder}/rec/week.py:week_config" in script
    assert "#SBATCH --job-name=week-config" in script


def test_a_pod_gets_the_file(folder: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--image", "image", "--claim", "data", "--gpus-per-node", "1", "--dry-run"]
    checkpoint = ["checkpoint.save=/shared/run", "checkpoint.load=/shared/run", "dataset.mock=true"]
    text = run(capsys, "launch", "k8s", "rec/week.py:week_config", *arguments, *checkpoint)
    parts = {part["kind"]: part for part in yaml.safe_load_all(text)}
    data = parts["ConfigMap"]["data"]
    assert data == {"0-week.py": WEEK, "1-beside.py": "LAYERS = 6\n"}
    name = "0-week.py"
    pod = parts["Job"]["spec"]["template"]["spec"]
    (place,) = (mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "config")
    assert f"pretrain {place}/{name}:week_config" in pod["containers"][0]["command"][-1]


@pytest.mark.dist
def test_it_trains(folder: Path):
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "rec/week.py:week_config", "--nproc", "2"]
    command += ["train.train_iters=2", "validation.eval_iters=0", "dist.device=cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "iteration        2/       2" in done.stdout
