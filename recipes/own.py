"""Recipes of one's own: `module:function` and `path/file.py:function`, wherever a recipe's name is taken."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, MegatronMTPError, Problem, cut, nearest


def own_recipe(name: str) -> Callable[[], ConfigContainer]:
    """The function of `module:function` or `path/file.py:function`.

    A module is looked for in the working directory too, a file's neighbours can be imported from it.

    Raises:
        ConfigError: there is no such file, module or function; the code of one of them fails; it returns no config.
    """
    source, _, function = name.rpartition(":") if ":" in name else (name, "", "")
    if not source or not function.isidentifier():
        raise _error(name, "must be module:function or path/file.py:function")
    path = recipe_file(name)
    module = _from_name(name, source) if path is None else _from_file(name, path)
    made = getattr(module, function, None)
    if not callable(made):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _error(name, f"{source} has no function {function!r}", nearest(function, known).strip())

    @wraps(made)
    def recipe() -> ConfigContainer:
        found = _run(name, made)
        if not isinstance(found, ConfigContainer):
            raise _error(name, f"must return a ConfigContainer, not {type(found).__name__}")
        if found.is_frozen:
            raise _error(name, "must return a config that is not finalized")
        return found

    return recipe


def recipe_file(name: str) -> Path | None:
    """The file of `path/file.py:function`; None for any other recipe."""
    source = name.rpartition(":")[0]
    return Path(source) if source.endswith(".py") else None


def absolute(name: str) -> str:
    """`name` with its file as an absolute path, for a process that starts in another directory."""
    path = recipe_file(name)
    return name if path is None else f"{path.absolute()}:{name.rpartition(':')[2]}"


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise _error(name, f"there is no file {path}")
    module_name = f"megatron_mtp_recipe_{path.absolute()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or (loader := spec.loader) is None:
        raise _error(name, f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    _find_modules_in(path.absolute().parent)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        _run(name, partial(loader.exec_module, module))
    except ConfigError:
        del sys.modules[module_name]
        raise
    return module


def _from_name(name: str, module: str) -> ModuleType:
    _find_modules_in(Path.cwd())
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise _error(name, f"there is no module {module!r} in the working directory or in the environment")
    return _run(name, partial(importlib.import_module, module))


def _find_modules_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _run(name: str, code: Callable[[], Any]) -> Any:
    """Runs the user's code; its exception becomes one message with the line that raised it."""
    try:
        return code()
    except MegatronMTPError:
        raise
    except Exception as error:  # the user's code may raise anything
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
        raise _error(name, f"{where}: {type(error).__name__}: {cut(str(error))}") from error


def _error(name: str, rule: str, remedy: str = "") -> ConfigError:
    return ConfigError(Problem(fields=(f"recipe {name}",), rule=rule, remedy=remedy))
