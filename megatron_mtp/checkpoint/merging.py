"""New checkpoints from old ones, tensor by tensor: the mean of several, and the weights of one without the optimizer.

One box is in memory at a time. Needs no model and no process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_mtp.checkpoint.compat import compare_weights
from megatron_mtp.checkpoint.kept_files import kept_folder
from megatron_mtp.checkpoint.manifest import TRAIN_STATE_NAME
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, place

Progress = Callable[[int, int], None]
"""Called with the tensors that are done and all of them."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written."""

    folder: Place
    tensors: int
    left_out: dict[str, int]
    """What is not a weight: kind -> number of tensors or objects."""


def average(sources: Sequence[str | Place], out: str | Place, progress: Progress | None = None) -> Merged:
    """Writes the mean of the weights of several checkpoints of one model, at iteration 0 of a new run directory.

    Sums are in fp64 and rounded once to the dtype of the weights, so that fp32 means are exact to the last bit.

    Args:
        sources: two or more, as `checkpoint_folder` takes them.
        out: run directory that holds no checkpoint.

    Raises:
        CheckpointError: a checkpoint is damaged or of another model, or `out` cannot be written.
    """
    if len(sources) < 2:
        raise CheckpointError("An average needs at least two checkpoints.")
    first, *others = [StoredWeights(source) for source in sources]
    for other in others:
        _require_same_model(first, other)
    folders = [stored.folder for stored in (first, *others)]
    if doubles := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise CheckpointError(f"{', '.join(doubles)}: is given more than once.")

    def mean(key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        box = first.read(key, offset, size)
        if not box.is_floating_point():
            return box
        total = box.double()
        for other in others:
            total += other.read(key, offset, size)
        return (total / (1 + len(others))).to(box.dtype)

    names = ", ".join(f"{stored.folder.parent.name}@{stored.manifest.iteration}" for stored in (first, *others))
    return _write(first, place(out), 0, TrainState().to_dict(), f"average of {names}", mean, progress)


def strip(source: str | Place, out: str | Place, progress: Progress | None = None) -> Merged:
    """Writes one checkpoint without optimizer and random state; its iteration and counters stay.

    Args:
        source: as `checkpoint_folder` takes it.
        out: run directory that holds no checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` cannot be written.
    """
    stored = StoredWeights(source)
    state = json.loads((stored.folder / TRAIN_STATE_NAME).read_bytes())["train"]
    iteration = stored.manifest.iteration
    return _write(stored, place(out), iteration, state, f"weights of {stored.folder.name}", stored.read, progress)


def _require_same_model(first: StoredWeights, other: StoredWeights) -> None:
    saved, present = (to_dict(stored.config()) for stored in (first, other))
    problems = compare_weights(saved, present, to_dict(ConfigContainer()))
    if not problems:
        keys = sorted(set(first.tensors) ^ set(other.tensors))
        keys += [key for key in first.tensors if key not in keys and first.shape(key) != other.shape(key)]
        problems = [f"{key}: its shape differs, or one of them lacks it." for key in keys[:5]]
    if problems:
        title = f"{other.folder}: holds the weights of another model than {first.folder}."
        raise CheckpointError("\n".join([title, *problems]))


def _write(
    source: StoredWeights,
    out: Place,
    iteration: int,
    train_state: dict[str, Any],
    reason: str,
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor],
    progress: Progress | None,
) -> Merged:
    kept = kept_folder(source.folder)
    with WeightsWriter(out, iteration=iteration) as writer:
        for number, key in enumerate(source.tensors, start=1):
            for offset, size in source.boxes(key):
                writer.add(key, source.shape(key), offset, read(key, offset, size))
            if progress is not None:
                progress(number, len(source.tensors))
        if kept is not None:
            writer.keep(kept)
        folder = writer.complete(source.config(), train_state, reason=reason, tokenizer=source.manifest.tokenizer)
    return Merged(folder, len(source.tensors), source.left_out)
