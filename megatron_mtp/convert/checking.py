"""Whether a checkpoint and a Hugging Face folder hold the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_mtp.convert.exporting import plan_checkpoint
from megatron_mtp.convert.hf_families import find_family
from megatron_mtp.convert.inventory import check_inventory
from megatron_mtp.convert.links import duplicates
from megatron_mtp.convert.names import EMBEDDING, HEAD
from megatron_mtp.convert.quantization import block_of
from megatron_mtp.convert.side_files import read_config
from megatron_mtp.convert.tensor_files import TensorFiles


@dataclass(slots=True)
class WeightDifferences:
    """Result of `check_hf`. `different`: name -> largest absolute difference; 0 if only the dtypes differ."""

    num_equal: int = 0
    different: dict[str, float] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether every tensor has the same bits."""
        return not self.different


def check_hf(
    checkpoint: str | Path, hf_dir: str | Path, *, family: str | None = None, mtp_depths: int | None = None
) -> WeightDifferences:
    """Compares every tensor, one at a time.

    Args:
        checkpoint: run directory, or the folder of one checkpoint.
        hf_dir: a folder that it was imported from or exported to.
        family, mtp_depths: as `export_hf`.

    Raises:
        ConversionError, CheckpointError: they are different models; names what is missing or left over.
    """
    model = plan_checkpoint(Path(checkpoint), family, mtp_depths, None)
    block = block_of(read_config(Path(hf_dir)))
    files = TensorFiles(Path(hf_dir), find_family(model.family).mtp_form.folder, block=block)
    shared = model.cfg.model.share_embeddings_and_output_weights
    check_inventory(
        files,
        model.links,
        duplicates=duplicates(model.family, model.cfg.model, model.num_depths),
        tied={HEAD: EMBEDDING} if shared else {},
    )
    result = WeightDifferences()
    for name, ours in model.tensors():
        theirs = files.read(name)
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            result.num_equal += 1
        else:
            result.different[name] = float((ours.double() - theirs.double()).abs().max())
    return result
