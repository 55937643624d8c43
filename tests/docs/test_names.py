"""Every file, name and config field that the docs mention exists, and the map lists the packages in their order."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from megatron_mtp.config import ConfigContainer

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
# The lab log and the guide for Megatron-Bridge's users name what is elsewhere; config.md is made from the code.
OTHERS = {"lab_log", "from_megatron_bridge", "config"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in OTHERS),
]
FILE = re.compile(r"([\w./-]+\.(?:py|md|toml|yaml|txt|sh))(?:::?([\w.]+))?|([a-z][\w-]*(?:/[\w-]+)*)/")
PLACES = (
    ROOT,
    ROOT / "megatron_mtp",
    ROOT / "megatron_mtp" / "examples" / "project",
    ROOT / "tests" / "numerics",
)


def mentions(page: Path) -> list[str]:
    """Text of the inline code of a page."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


def problem(mention: str) -> str | None:
    """Why what is mentioned cannot be found; None if it can, or if it is no name of ours."""
    if file := FILE.fullmatch(mention):
        path = next((path for place in PLACES if (path := place / (file[1] or file[3])).exists()), None)
        if path is None:
            return "no such file"
        return None if file[2] is None or defines(path, file[2]) else "no such name in the file"
    if mention.startswith("megatron_mtp.") and re.fullmatch(r"[\w.]+", mention):
        parts = mention.split(".")
        for end in range(len(parts), 0, -1):
            base = ROOT.joinpath(*parts[:end])
            module = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            if module.is_file():
                return None if end == len(parts) or defines(module, ".".join(parts[end:])) else "no such name"
        return "no such module"
    if re.fullmatch(r"cfg(\.\w+)+", mention):
        value = ConfigContainer()
        for name in mention.removeprefix("cfg.").split("."):
            if not hasattr(value, name):
                return "no such field"
            value = getattr(value, name)
    return None


def defines(path: Path, name: str) -> bool:
    """Whether a module assigns, imports or defines `name`, or `Class.attribute`."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if part in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement brings into being."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.ImportFrom() | ast.Import():
            return {alias.asname or alias.name for alias in node.names}
        case ast.If():
            return {name for inner in node.body for name in names_of(inner)}
    return set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_mentioned_exists(page):
    problems = {mention: text for mention in mentions(page) if (text := problem(mention))}
    assert not problems


def test_the_map_lists_the_packages_as_the_contract_does():
    (contract, _) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"megatron_mtp\.(\w+)", layer) for layer in contract["layers"]]
    packages = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```\n")[1]
    assert [line.split() for line in packages.splitlines()] == layers


def test_a_wrong_name_is_found():
    wrong = [
        "training/no_such.py",
        "training/loop.py:no_such",
        "megatron_mtp.training.loop.no_such",
        "cfg.model.no_such",
        "nowhere/",
    ]
    right = [
        "training/loop.py",
        "training/loop.py:Trainer.train",
        "megatron_mtp.training.loop.Trainer",
        "cfg.model.num_layers",
        "data/",
        "depth",
    ]
    assert all(map(problem, wrong))
    assert not any(map(problem, right))
