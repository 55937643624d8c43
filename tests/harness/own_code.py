"""A working directory with Python files of a user."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    new = set(sys.modules) - before
    # All are found before any is deleted: the path of a package without __init__.py asks for its parent.
    for name in [name for name in new if _lies_in(tmp_path, sys.modules[name])]:
        del sys.modules[name]


def _lies_in(folder: Path, module: ModuleType) -> bool:
    path = getattr(module, "__path__", ())
    # torch.classes and its like answer every attribute with something.
    places = [getattr(module, "__file__", None), *(path if isinstance(path, Iterable) else ())]
    return any(place and Path(place).is_relative_to(folder) for place in places)
