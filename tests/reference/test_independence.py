"""The judge imports nothing of what it judges."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ALLOWED = {"torch", "tests"} | set(sys.stdlib_module_names)
FILES = [path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_torch_is_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in ALLOWED, name
            assert not name.startswith("tests.") or name.startswith("tests.reference."), name
