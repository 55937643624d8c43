"""Reads what torch.save wrote without running any of it: classes and functions that the file names become records.

Megatron-LM's checkpoints hold their arguments as a pickled Namespace, with enumerations and functions of many versions
among them. Only plain values are of interest here. Needs no torch.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import IO, Any

_ELEMENTS = {"DoubleStorage": "d", "FloatStorage": "f", "LongStorage": "q", "IntStorage": "i", "BoolStorage": "?"}


class Inert:
    """A value of a class that is not loaded: its name, and the attributes that the file gives it."""

    kind = ""

    def __init__(self, *arguments: Any, **_: Any):
        self.arguments = arguments
        self.items: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    def __setitem__(self, name: Any, value: Any) -> None:
        self.items.append((name, value))

    def append(self, value: Any) -> None:
        """For lists of an unknown class."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """As `append`."""
        self.items.extend(values)

    add = append


class _Unpickler(pickle.Unpickler):
    """Loads no class: what a pickle may call is `dict`, `set`, `tuple`, or the making of an `Inert`."""

    def __init__(self, stream: IO[bytes], archive: zipfile.ZipFile, prefix: str):
        super().__init__(stream)
        self._archive, self._prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset"), ("torch", "Size")):
            return {"set": set, "frozenset": frozenset, "Size": tuple}[name]
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return self._scalar
        return type(name, (Inert,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def _scalar(self, storage: Any, offset: int, size: Any, *_: Any) -> Any:
        """The number in a tensor of one element; None for larger ones, which are no settings."""
        _, kind, key, _, count = storage
        code = _ELEMENTS.get(getattr(kind, "__name__", ""))
        if code is None or count != 1 or offset != 0 or any(axis != 1 for axis in size):
            return None
        return struct.unpack(f"<{code}", self._archive.read(f"{self._prefix}data/{key}"))[0]


def read_inert(content: bytes) -> Any:
    """The value in a file of torch.save, with an `Inert` in place of each class and function.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
            prefix = name.removesuffix("data.pkl")
            return _Unpickler(io.BytesIO(archive.read(name)), archive, prefix).load()
    except Exception as error:  # a pickle that does not fit may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of a record, or a dictionary itself; empty for anything else."""
    if isinstance(value, dict):
        return value
    return {k: v for k, v in vars(value).items() if k not in ("arguments", "items")} if isinstance(value, Inert) else {}
