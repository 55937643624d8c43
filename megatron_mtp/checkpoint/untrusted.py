"""Checks the pickled parts of a checkpoint before anything loads them: a malicious checkpoint cannot execute code.

Checksums do not help here, since an attacker computes them as well. Megatron-Core and torch unpickle the metadata and
every stored object without restrictions, so each is first read by an unpickler that accepts a few harmless names only.
"""

from __future__ import annotations

import io
import pickle
import stat
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_mtp.checkpoint.agreement import describe_error
from megatron_mtp.checkpoint.manifest import METADATA_NAME, Manifest
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, files_in

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class _Unpickler(pickle.Unpickler):
    """Accepts a few harmless names.

    Attributes:
        is_foreign: a record that loads no class stands for every other name; otherwise such a name is an error.
    """

    is_foreign = False

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if self.is_foreign:
            return type(name, (_Unread,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Unread:
    """Stands for what a foreign checkpoint's metadata holds besides the places of its tensors, such as save plans."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Rehearsal(_Unpickler):
    """Reads with stand-ins whose attributes cannot be set.

    A pickle may set attributes of whatever it names. A changed class of torch would stay changed for this process and
    for the checkpoints that it saves.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if isinstance(found, torch.dtype) or found is torch.Size:  # neither can be written to
            return found
        if isinstance(found, type) and not issubclass(found, Enum):
            return _Guarded(name, (found,), {"__setstate__": _ignore} if hasattr(found, "__setstate__") else {})
        return _StandIn(found)


class _Guarded(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of {cls.__name__}")


class _StandIn:
    """For a function, an enum, and what they return."""

    __slots__ = ("_real",)

    def __init__(self, real: Any):
        self._real = real

    def __call__(self, *arguments: Any) -> _StandIn:
        return _StandIn(self._real(*arguments))

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {self._real}")


def _ignore(_: Any, __: Any) -> None:
    """In place of a __setstate__ that looks into stand-ins."""


def read_metadata(directory: Place, manifest: Manifest | None = None, *, is_foreign: bool = False) -> Metadata:
    """The metadata of a checkpoint, after it and every object it points to were checked.

    Args:
        manifest: must list every file that the metadata leads to, or the file has no checksum; None: it was asked
            before.
        is_foreign: Megatron-Core's own writer made it, which pickles its plans too, and any object beside tensors.
            They are not loaded here, and the caller must load none.

    Raises:
        CheckpointError: something does not belong in a checkpoint.
    """
    path = directory / METADATA_NAME
    try:
        content = path.read_bytes()
        for kind in (_Rehearsal, _Unpickler):
            unpickler = kind(io.BytesIO(content))
            unpickler.is_foreign = is_foreign
            metadata = unpickler.load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        object_keys = {
            key for key, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)
        }
        listed = None if manifest is None else {entry.name for entry in manifest.files}
        places = [(index.fqn, info) for index, info in metadata.storage_data.items()]
        here = {name for name, found in files_in(directory).items() if stat.S_ISREG(found.st_mode)}
        for _, info in places:
            name = info.relative_path
            if name not in here or getattr(info, "transform_descriptors", None):
                raise ValueError(f"it leads to {name!r}")
            if listed is not None and name not in listed:
                raise ValueError(f"it leads to {name!r}, which the manifest does not list")
    except Exception as error:
        raise CheckpointError(f"{path}: is not a checkpoint's metadata ({error}).") from error
    for key, info in () if is_foreign else places:
        if key in object_keys:
            _check_object(directory / info.relative_path, key, info.offset, info.length)
    return metadata


def _check_object(path: Place, key: str, offset: int, length: int) -> None:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            torch.load(io.BytesIO(stream.read(length)), weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path}: the object {key!r} is not plain data ({describe_error(error)}).") from error
