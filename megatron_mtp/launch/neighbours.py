"""What the files of a job import from beside them, so that it can travel with them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

IN_THE_IMAGE = ("megatron_mtp", "megatron")
"""This package and Megatron-Core, which a checkout may hold beside a recipe."""


def neighbours(file: Path) -> dict[str, Path]:
    """The modules beside a Python file that it imports, directly or through each other.

    A package with an `__init__.py` counts with all its Python files. Only import statements are read: a name that is
    put together when the code runs is not found, nor is a file that is no module.

    Returns:
        Path relative to the folder of `file` -> file.
    """
    folder, found, unread = file.absolute().parent, dict[str, Path](), [file.absolute()]
    while unread:
        inside = unread.pop()
        for name in _imports(inside, folder):
            new = [path for path in _files(folder, name.split(".")) if path.relative_to(folder).as_posix() not in found]
            found |= {path.relative_to(folder).as_posix(): path for path in new}
            unread += new
    return dict(sorted(found.items()))


def _imports(file: Path, folder: Path) -> Iterator[str]:
    """Full names of the modules that a file imports; of `from a import b` both `a` and `a.b`, which may be one."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # it fails in the job as it does here, whatever it imports
        return
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ([module] if module else [])
            yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)


def _files(folder: Path, parts: Iterable[str]) -> list[Path]:
    """The files of a module that lies in `folder`, its packages included."""
    place = folder
    for depth, part in enumerate(parts):
        if depth == 0 and part in IN_THE_IMAGE:
            return []
        if (place / part / "__init__.py").is_file():
            return sorted(path for path in (place / part).rglob("*.py") if _is_module(path.relative_to(place)))
        if (module := place / f"{part}.py").is_file():
            return [module]
        place = place / part
    return []


def _is_module(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)
