"""The table of changes is complete and true, and importing the package changes nothing."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_mtp.mcore.patches import MCORE_VERSIONS, PATCHES, replaced

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_mtp"
MAY_PATCH = ("mcore/", "device/cpu_facade.py", "storage/connection.py")
# Files whose objects are Megatron-Core's, so that an attribute that they set is a change of it.
BUILDERS = [*PACKAGE.glob("model/**/*.py"), *(PACKAGE / f for f in ("training/optimizer.py", "training/setup.py"))]
OF_TORCH = {"data", "requires_grad"}


def names(target: str) -> set[str]:
    """The attributes that a row names: "A.b.c | d" -> {"c", "d"}."""
    return {part.split(" (")[0].strip().rpartition(".")[2] for part in target.split("|")}


@pytest.mark.parametrize("patch", PATCHES, ids=[f"{patch.where}:{patch.target[:40]}" for patch in PATCHES])
def test_every_row_is_true(patch):
    path, _, function = patch.test.partition("::")
    assert (ROOT / path).is_file()
    assert not function or re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE)
    source = (PACKAGE / patch.where).read_text()
    if not patch.target.startswith("torch.cuda,"):
        for name in names(patch.target) - {"filters", "level"}:
            assert re.search(rf"\b{name}\b", source), name


def test_the_table_is_for_the_version_that_is_installed():
    assert version("megatron-core").startswith(MCORE_VERSIONS)


def _changes(path: Path) -> Iterator[tuple[str, str]]:
    """(what, how) of each assignment to an imported name of another project, or of a class, in one file."""
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megatron_mtp"):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
        for target in [item for one in targets for item in getattr(one, "elts", [one])]:
            if isinstance(target, ast.Attribute):
                owner = target.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                if target.attr == "__class__" or (isinstance(owner, ast.Name) and owner.id in foreign):
                    yield ast.unparse(target), "assigned"
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "delattr"):
            if ast.unparse(node.args[0]).split(".")[0] in foreign:
                yield ast.unparse(node), "assigned"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "replaced":
            yield ast.unparse(node), "replaced"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "filterwarnings",
            "simplefilter",
        ):
            yield ast.unparse(node), "warnings"


def test_nothing_else_is_changed():
    listed = {patch.where for patch in PATCHES}
    found = []
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith(MAY_PATCH):
            found += [(where, *change) for change in _changes(path) if change[1] == "assigned" or where not in listed]
    assert found == []


@pytest.mark.parametrize("path", BUILDERS, ids=[path.relative_to(PACKAGE).as_posix() for path in BUILDERS])
def test_every_attribute_that_is_set_on_an_object_of_the_engine_is_listed(path):
    where = path.relative_to(PACKAGE).as_posix()
    listed = set().union(*(names(patch.target) for patch in PATCHES if patch.where == where))
    assigned = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign):
            for target in [item for one in node.targets for item in getattr(one, "elts", [one])]:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) not in ("self", "cls", "ctx"):
                    assigned.add(target.attr)
    assigned -= {"config"} | OF_TORCH
    assert assigned <= listed


# Prints what importing every module of the package changed in the names of the table, in warnings and in loggers.
IMPORT_ALL = """
import importlib, json, logging, pkgutil, sys, warnings
from megatron_mtp.mcore.patches import PATCHES
from megatron_mtp.observe.logs import _LOGGERS, _WARNINGS
import megatron.core.models.gpt.gpt_model, megatron.core.ssm.gated_delta_net.common, megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules, megatron.core.tensor_parallel.random, torch.distributed
from megatron_mtp.device.cpu_facade import replacements

owners = {}
for patch in PATCHES:
    first, *others = [part.strip() for part in patch.target.split("|")]
    module, _, name = first.rpartition(".")
    if module in sys.modules and module != "warnings":
        owners |= {f"{module}.{n}": (sys.modules[module], n) for n in (name, *others)}
for row in replacements(torch.device("cpu")):
    owners[f"{row.owner}.{row.name}"] = (row.owner, row.name)

def state():
    found = {key: id(getattr(*owner, None)) for key, owner in owners.items()}  # None: made while it is in force
    ours = {message for message, _, _ in _WARNINGS} | {"megatron.core"}
    texts = [{getattr(part, "pattern", part) for part in entry if part} for entry in warnings.filters]
    found["warnings"] = sum(bool(ours & entry) for entry in texts)
    found |= {name: logging.getLogger(name).level for name, _, _ in _LOGGERS}
    return found | {"root": len(logging.getLogger().handlers), "ours": logging.getLogger("megatron_mtp").level}

import megatron_mtp
modules = [m.name for m in pkgutil.walk_packages(megatron_mtp.__path__, "megatron_mtp.", onerror=lambda name: None)]
modules = [name for name in modules if not name.endswith(("__main__", ".preload")) and ".tools" not in name]
before = state()
for name in modules:
    importlib.import_module(name)
after = state()
print(json.dumps({"modules": len(modules), "names": len(owners),
                  "changed": [key for key in before if before[key] != after[key]]}))
"""


def test_importing_the_package_changes_nothing():
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=240, env=environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] > 150
    assert found["names"] > 30
    assert found["changed"] == []


def test_replaced_puts_back_own_and_inherited_attributes():
    class Parent:
        a = 1

    class Child(Parent):
        b = 2

    with contextlib.suppress(KeyError), replaced(Child, a=10, b=20):
        assert (Child.a, Child.b) == (10, 20)
        raise KeyError
    assert (Child.a, Child.b) == (1, 2)
    assert "a" not in vars(Child)
