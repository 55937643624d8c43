"""Callbacks that a config or --callback names: found, checked before anything is written, recorded, passed on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_mtp import pretrain
from megatron_mtp.cli.choose import choose_config
from megatron_mtp.cli.main import main
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.callbacks.named import check_callbacks
from tests.training.callbacks.test_callbacks import short

MINE = """\
from megatron_mtp.training.callbacks import Callback

class Steps(Callback):
    def __init__(self, start=10):
        self.steps = start

    def on_step_end(self, run, state, result):
        self.steps += 1
        return {"mine/steps": self.steps}

class Misspelt(Callback):
    def on_step_ended(self, run, state, result):
        return {}

class Short(Callback):
    def on_step_end(self, run, state):
        return {}

class Needy(Callback):
    def __init__(self, patience):
        pass

class Failing(Callback):
    def __init__(self):
        raise KeyError("no such server")

class Plain:
    pass

def function():
    pass
"""
WRONG = [
    ("none.py:Steps", "there is no file none.py"),
    ("no_module:Steps", "there is no module 'no_module'"),
    ("mine.py:Step", "has no class 'Step'. Did you mean Steps?"),
    ("mine.py:function", "has no class 'function'"),
    ("mine.py:Plain", "must be a subclass of megatron_mtp.training.callbacks.Callback"),
    (
        "mine.py:Misspelt",
        "Misspelt.on_step_ended would never be called: there is no such event. Did you mean on_step_end?",
    ),
    ("mine.py:Short", "Short.on_step_end is called as on_step_end(run, state, result)"),
    ("mine.py:Needy", "is made without arguments: missing a required argument: 'patience'"),
    ("mine.py", "must be module:Class or path/file.py:Class"),
]


@pytest.fixture
def folder(own_folder: Path) -> Path:
    """A working directory with a file of callbacks."""
    (own_folder / "mine.py").write_text(MINE)
    return own_folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize(("name", "rule"), WRONG)
@pytest.mark.parametrize("command", ["show", "pretrain"])
def test_a_name_that_is_wrong_is_refused_before_anything_is_written(folder: Path, capsys, command, name, rule):
    text = refused(capsys, command, "tiny_dense", "--callback", name, "checkpoint.save=run", "logger.log_dir=log")
    assert text.startswith(f"megatron-mtp: train.callbacks = {name!r}: ")
    assert rule in text
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".pyc") in (
        ["mine.py"],
        ["__pycache__", "mine.py"],
    )


@pytest.mark.unit
def test_all_problems_are_told_together(folder: Path, capsys):
    text = refused(capsys, "show", "tiny_dense", "train.callbacks=[mine.py:Plain,mine.py:Short]", "--json")
    assert "2 problems" in text


@pytest.mark.dist
def test_a_constructor_that_fails_is_one_line(folder: Path):
    cfg = short(folder / "log")
    cfg.train.callbacks = ["mine.py:Failing"]
    with pytest.raises(ConfigError, match=r"train.callbacks = 'mine.py:Failing': .*mine.py:\d+, in __init__: KeyError"):
        pretrain(cfg)
    assert not (folder / "log").exists()


@pytest.mark.dist
def test_they_are_made_recorded_and_free_on_a_resume(folder: Path):
    cfg = short(folder / "log", exit_interval=2)
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "run")
    cfg.train.callbacks = ["mine.py:Steps"]
    pretrain(cfg)
    assert [step["mine/steps"] for step in read_metrics(folder / "log" / "metrics.jsonl")] == [11, 12]
    saved = yaml.safe_load((folder / "run" / "iter_0000002" / "config.yaml").read_text())
    assert saved["train"]["callbacks"] == ["mine.py:Steps"]
    cfg.train.callbacks, cfg.train.exit_interval = [], None
    assert pretrain(cfg).state.iteration == 4


@pytest.mark.unit
def test_a_name_that_is_given_twice_is_taken_once(folder: Path):
    given = ["train.callbacks=[mine.py:Steps,mine.py:Plain]"]
    again = ["./mine.py:Plain", f"{folder}/mine.py:Steps", "mine:Steps", "mine:Steps"]
    cfg = choose_config("tiny_dense", None, given, again)
    assert cfg.train.callbacks == ["mine.py:Steps", "mine.py:Plain", "mine:Steps"]


@pytest.mark.unit
def test_the_recipes_own_stay(folder: Path, capsys):
    overlay = folder / "overlay.yaml"
    overlay.write_text("train:\n  callbacks: [mine.py:Steps]\n")
    with pytest.raises(SystemExit):
        main(["show", "tiny_dense", "--config", str(overlay), "--callback", "mine:Steps", "--json"])
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert changes == {"train.callbacks": {"recipe": [], "here": ["mine.py:Steps", "mine:Steps"]}}


@pytest.mark.unit
def test_the_form_of_a_name_is_part_of_the_config():
    cfg = get_recipe("tiny_dense")
    cfg.train.callbacks = ["a.b:C", "dir/x.py:C", "no colon", "a b:C", ":C"]
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert [(problem.fields[0], problem.value) for problem in caught.value.problems] == [
        ("train.callbacks", name) for name in ("no colon", "a b:C", ":C")
    ]


@pytest.mark.unit
def test_callbacks_from_python_are_checked_too():
    class Misspelt(Callback):
        def on_evaluated(self, run, state, results):
            pass

    with pytest.raises(ConfigError, match=r"callbacks: Misspelt.on_evaluated would never be called"):
        check_callbacks([Misspelt()])
