"""What a recipe, callback or script imports from beside it travels with a pod, and is found there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.hints import job_hints
from megatron_mtp.launch.job import Job
from megatron_mtp.launch.k8s import Request, manifests
from megatron_mtp.launch.neighbours import neighbours
from megatron_mtp.launch.view import View
from megatron_mtp.recipes import get_recipe
from tests.launch.jobs import make_job

pytestmark = pytest.mark.unit
FILES = {
    "mine.py": "import os, json.decoder\nfrom common import LAYERS\nfrom megatron_mtp.recipes import get_recipe\n\n"
    "def f():\n    import part.deep.one\n    cfg = get_recipe('tiny_dense')\n    cfg.model.num_layers = LAYERS\n"
    "    return cfg\n",
    "common.py": "from own import LAYERS\n",
    "own/__init__.py": "from .sizes import LAYERS\n",
    "own/sizes.py": "from . import more\nLAYERS = more.LAYERS\n",
    "own/more.py": "import above\nLAYERS = 6\n",
    "own/unused.py": "",
    "own/.hidden/x.py": "",
    "part/deep/one.py": "import mine\n",
    "part/deep/two.py": "",
    "above.py": "",
    "stranger.py": "",
    "megatron_mtp/__init__.py": "",
    "broken.py": "def f(:\n",
}
TRAVEL = ["above.py", "common.py", "mine.py", "own/__init__.py", "own/more.py", "own/sizes.py", "own/unused.py"]


@pytest.fixture
def folder(own_folder: Path) -> Path:
    for name, text in FILES.items():
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text(text)
    return own_folder


def mounted(job: Job, place: Path) -> Path:
    """The folder that a pod sees, with the links that Kubernetes makes."""
    config, whole = manifests(job, Request(image="i"))[1:]
    (volume,) = (one for one in whole["spec"]["template"]["spec"]["volumes"] if one["name"] == "config")
    items: list[dict[str, Any]] = volume["configMap"]["items"]
    assert {item["key"] for item in items} == set(config["data"])
    for item in items:
        file = place / "..2026" / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config["data"][item["key"]])
    (place / "..data").symlink_to("..2026")
    for name in {item["path"].partition("/")[0] for item in items}:
        (place / name).symlink_to(f"..data/{name}")
    return place


def test_imports_are_followed_through_modules_and_packages(folder: Path):
    assert list(neighbours(folder / "mine.py")) == [*TRAVEL, "part/deep/one.py"]
    assert list(neighbours(folder / "common.py")) == [TRAVEL[0], *TRAVEL[3:]]
    assert neighbours(folder / "broken.py") == neighbours(folder / "none.py") == {}


def test_a_recipe_finds_them_in_the_pod(folder: Path):
    place = mounted(make_job(recipe=f"{folder}/mine.py:f"), folder / "pod")
    for name in FILES:
        (folder / name).unlink()
    assert get_recipe(f"{place}/0-mine.py:f").model.num_layers == 6


def test_a_script_finds_them_in_the_pod(folder: Path):
    script = folder / "train.py"
    script.write_text("from own.sizes import LAYERS\nprint(LAYERS)\n")
    place = mounted(make_job(recipe=None, script=script), folder / "pod")
    command = [sys.executable, str(place / "0-train.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "6\n", done.stderr


def test_two_modules_of_one_name_are_refused(folder: Path):
    other = folder / "other"
    other.mkdir()
    (other / "common.py").write_text("")
    (other / "cb.py").write_text("import common\n")
    job = make_job(recipe=f"{folder}/mine.py:f", train__callbacks=[f"{other}/cb.py:C"])
    with pytest.raises(ConfigError, match=r"other/common\.py: the job imports .*common\.py too"):
        manifests(job, Request(image="i"))


def test_what_is_not_utf_8_is_refused(folder: Path):
    (folder / "common.py").write_bytes(b"# -*- coding: latin-1 -*-\nLAYERS = 6  # \xe9\n")
    with pytest.raises(ConfigError, match=r"common\.py: is not UTF-8"):
        manifests(make_job(recipe=f"{folder}/mine.py:f"), Request(image="i"))


def test_the_launch_says_what_travels(folder: Path):
    job = make_job(recipe=f"{folder}/mine.py:f", train__callbacks=["package.module:Mine"])
    hints = job_hints(job, "k8s", View(), {})
    assert "package.module:Mine: the image must hold the module." in hints
    assert any(hint.startswith("above.py, common.py, mine.py, own/__init__.py") for hint in hints)
