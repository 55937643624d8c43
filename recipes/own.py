"""Code of one's own: `module:NAME` and `path/file.py:NAME`, wherever a recipe or a callback is named."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, MegatronMTPError, Problem, ProblemsError, cut, nearest

PACKAGE = Path(__file__).parents[1]


def own_recipe(name: str) -> Callable[[], ConfigContainer]:
    """The function of `module:function` or `path/file.py:function`.

    Raises:
        ConfigError: there is no such file, module or function; the code of one of them fails; it returns no config.
    """
    code = OwnCode(name, "function", Problem(fields=(f"recipe {name}",), rule=""))
    made = code.find()

    @wraps(made)
    def recipe() -> ConfigContainer:
        found = code.run(made)
        if not isinstance(found, ConfigContainer):
            raise code.error(f"must return a ConfigContainer, not {type(found).__name__}")
        if found.is_frozen:
            raise code.error("must return a config that is not finalized")
        return found

    return recipe


def recipe_file(name: str) -> Path | None:
    """The file of `path/file.py:NAME`; None for any other name."""
    source = name.rpartition(":")[0]
    return Path(source) if source.endswith(".py") else None


def absolute(name: str) -> str:
    """`name` with its file as an absolute path, for a process that starts in another directory."""
    path = recipe_file(name)
    return name if path is None else f"{path.absolute()}:{name.rpartition(':')[2]}"


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A function or class outside the package. A module is looked for in the working directory too, and a file's
    neighbours can be imported from it.

    Args:
        name: `module:NAME` or `path/file.py:NAME`.
        kind: "function" or "class".
        subject: what messages are about; its rule and remedy are replaced.
    """

    name: str
    kind: str
    subject: Problem

    def find(self) -> Any:
        """The function or class.

        Raises:
            ConfigError: there is no such file, module or name, or importing fails.
        """
        source, _, attribute = self.name.rpartition(":") if ":" in self.name else (self.name, "", "")
        if not source or not attribute.isidentifier():
            raise self.error(f"must be module:{self.kind} or path/file.py:{self.kind}")
        path = recipe_file(self.name)
        module = self._from_name(source) if path is None else self._from_file(path)
        found = getattr(module, attribute, None)
        if not (isinstance(found, type) if self.kind == "class" else callable(found)):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise self.error(f"{source} has no {self.kind} {attribute!r}", nearest(attribute, known).strip())
        return found

    def run(self, code: Callable[[], Any]) -> Any:
        """Runs the user's code; its exception becomes one message with the line that raised it."""
        try:
            return code()
        except ProblemsError as error:
            if (where := _where(error)) is None:
                raise
            raise error.within(where) from error
        except MegatronMTPError:
            raise
        except Exception as error:  # the user's code may raise anything
            if isinstance(error, SyntaxError):
                where = f"{error.filename}:{error.lineno}"
            else:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
            raise self.error(f"{where}: {type(error).__name__}: {cut(str(error))}") from error

    def error(self, rule: str, remedy: str = "") -> ConfigError:
        """The error that this code breaks `rule`."""
        return ConfigError(replace(self.subject, rule=rule, remedy=remedy))

    def _from_file(self, path: Path) -> ModuleType:
        if not path.is_file():
            raise self.error(f"there is no file {path}")
        module_name = f"megatron_mtp_own_{path.absolute()}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or (loader := spec.loader) is None:
            raise self.error(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        _find_modules_in(path.absolute().parent)
        sys.modules[module_name] = module  # dataclasses look their module up
        try:
            self.run(partial(loader.exec_module, module))
        except ConfigError:
            del sys.modules[module_name]
            raise
        return module

    def _from_name(self, module: str) -> ModuleType:
        _find_modules_in(Path.cwd())
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise self.error(f"there is no module {module!r} in the working directory or in the environment")
        imported: ModuleType = self.run(partial(importlib.import_module, module))
        return imported


def _where(error: ProblemsError) -> str | None:
    """File and line at which the user's code called this package, which raised `error`; None: it did not call it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without that of `run`
    own = list(takewhile(lambda frame: not Path(frame.filename).is_relative_to(PACKAGE), frames))
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _find_modules_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
