"""Writes a checkpoint from another one, with some tensors replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from megatron_mtp.checkpoint.kept_files import KEPT_FOLDER, kept_folder
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConversionError
from megatron_mtp.training.state import TrainState


def rewrite(stored: StoredWeights, new: dict[str, Tensor], cfg: ConfigContainer, out: Path, *, reason: str) -> None:
    """Writes a checkpoint of iteration 0 with the weights and dtypes of `stored`, and the tensors in `new` replaced.

    Args:
        new: key in the checkpoint -> full tensor.
        cfg: config of the result; not finalized.
        out: run directory without checkpoints.
        reason: why it was written, for the manifest.

    Raises:
        ConversionError: the model has no tensor of this name and shape.
        CheckpointError: `out` is not writable or holds a checkpoint.
    """
    if misfits := [key for key, value in new.items() if key not in stored.tensors or stored.shape(key) != value.shape]:
        raise ConversionError(f"{stored.folder}: has no tensor of this name and shape: {', '.join(sorted(misfits))}.")
    kept = kept_folder(stored.folder)
    with WeightsWriter(out) as writer:
        for key in stored.tensors:
            for offset, size in stored.boxes(key):
                place = tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))
                box = new[key][place].to(stored.dtype(key)) if key in new else stored.read(key, offset, size)
                writer.add(key, stored.shape(key), offset, box.contiguous())
        writer.complete(cfg.finalize(), TrainState().to_dict(), reason=reason, tokenizer=stored.manifest.tokenizer)
    if kept is not None:  # last: a failed checkpoint leaves nothing behind
        shutil.copytree(kept, out / KEPT_FOLDER)
