"""Makes checkpoint folders without a model, for tests of what is around it."""

from __future__ import annotations

import json
from collections.abc import Collection

from megatron_mtp.checkpoint.completion import BEGUN_NAME
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.manifest import (
    CONFIG_NAME,
    METADATA_NAME,
    TRAIN_STATE_NAME,
    FileEntry,
    Manifest,
    hash_file,
)
from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_yaml
from megatron_mtp.data.sources import data_fingerprints
from megatron_mtp.storage.place import Place


def write_checkpoint(
    path: Place,
    iteration: int,
    cfg: ConfigContainer | None = None,
    validation_loss: float | None = None,
    replaceable: Collection[int] = (),
) -> Place:
    """A whole checkpoint with a config, a train state and one file of data; its metadata cannot be loaded."""
    cfg = cfg or ConfigContainer()
    path.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(path)
    directory.replaceable |= set(replaceable)
    partial = directory.begin(iteration)
    (partial / CONFIG_NAME).write_bytes(to_yaml(cfg).encode())
    state = TrainState(iteration=iteration, consumed_samples=iteration * 4)
    scalars = {"step": None, "grad_scaler": None}
    (partial / TRAIN_STATE_NAME).write_bytes(json.dumps({"train": state.to_dict(), "optimizer": scalars}).encode())
    for name in (METADATA_NAME, "metadata.json"):
        (partial / name).write_bytes(b"for Megatron-Core's loader")
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * 4)
    files = [describe_file(file) for file in sorted(partial.iterdir()) if file.name != BEGUN_NAME]
    manifest = Manifest(
        iteration=iteration,
        files=files,
        consumed_samples=iteration * 4,
        validation_loss=validation_loss,
        tokenizer=tokenizer_fingerprint(cfg),
        data=list(data_fingerprints(cfg).values()),
    )
    return directory.complete(manifest)


def damage_file(file: Place, how: str) -> None:
    """Truncates or deletes a file, or flips one bit in its middle."""
    if how == "deleted":
        file.unlink()
        return
    raw = bytearray(file.read_bytes())
    if how == "truncated":
        del raw[-1:]
    else:
        raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


def describe_file(file: Place) -> FileEntry:
    """The manifest's entry for a file that is complete."""
    return FileEntry(file.name, file.stat().st_size, hash_file(file))
