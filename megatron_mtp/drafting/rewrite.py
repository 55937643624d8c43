"""A checkpoint of weights made from another one, with some tensors changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from megatron_mtp.checkpoint.streaming import StoredWeights, WeightsWriter
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.side_files import KEPT_FOLDER
from megatron_mtp.errors import ConversionError
from megatron_mtp.training.state import TrainState


def rewrite(stored: StoredWeights, new: dict[str, Tensor], cfg: ConfigContainer, out: Path, *, reason: str) -> None:
    """Writes a checkpoint of iteration 0 with the weights of `stored`, but for those in `new`, in its dtypes.

    Args:
        new: whole tensors by their keys in the checkpoint.
        cfg: of the result; not finalized.
        out: run directory, without checkpoints.
        reason: for the manifest.

    Raises:
        ConversionError: `new` holds a tensor that the model has not, or in another shape.
        CheckpointError: `out` cannot be written or holds a checkpoint.
    """
    if misfits := [key for key, value in new.items() if key not in stored.tensors or stored.shape(key) != value.shape]:
        raise ConversionError(f"{stored.folder}: holds no tensor of this name and shape: {', '.join(sorted(misfits))}.")
    kept = stored.folder.parent / KEPT_FOLDER
    with WeightsWriter(out) as writer:
        for key in stored.tensors:
            for offset, size in stored.boxes(key):
                place = tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))
                box = new[key][place].to(stored.dtype(key)) if key in new else stored.read(key, offset, size)
                writer.add(key, stored.shape(key), offset, box.contiguous())
        writer.complete(cfg.finalize(), TrainState().to_dict(), reason=reason, tokenizer=stored.manifest.tokenizer)
    if kept.is_dir():  # only now: a checkpoint that could not be written leaves nothing behind
        shutil.copytree(kept, out / KEPT_FOLDER)
