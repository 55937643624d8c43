"""`megatron-mtp new`: writes the files of `examples/project/` under a name of one's own."""

from __future__ import annotations

import keyword
from pathlib import Path

from megatron_mtp.errors import ConfigError, Problem

TEMPLATE = Path(__file__).with_name("project")
PLACEHOLDER = "my_project"
FILES = ("README.md", "recipe.py", "callbacks.py", "cluster.yaml")


def new_project(name: str, parent: Path) -> list[Path]:
    """Writes the folder `name` with a recipe, a callback, an overlay and a README.

    Args:
        name: also of the recipe's function.
        parent: folder in which the project's folder is made.

    Returns:
        The files.

    Raises:
        ConfigError: the name is no identifier, or the folder is not empty or cannot be written.
    """
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        rule = "is the name of a Python function: letters, digits and '_', no digit first"
        raise ConfigError(Problem(fields=("NAME",), value=name, rule=rule))
    folder = parent / name
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            rule = f"{folder} exists and is not an empty folder"
            raise ConfigError(Problem(fields=("NAME",), value=name, rule=rule, remedy="Choose another name."))
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            text = (TEMPLATE / file).read_text(encoding="utf-8")
            (folder / file).write_text(text.replace(PLACEHOLDER, name), encoding="utf-8")
    except OSError as error:
        rule = f"{folder} cannot be written: {error.strerror}"
        raise ConfigError(Problem(fields=("NAME",), value=name, rule=rule)) from None
    return [folder / file for file in FILES]
