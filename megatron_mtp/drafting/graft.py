"""Joins the trunk of one checkpoint, bit for bit, with the MTP layers of another.

    python -m megatron_mtp.drafting.graft runs/fitted --drafter runs/drafter --out runs/model

Use it for a drafter that was trained in bf16: its run also holds the frozen trunk rounded to bf16, but the original
trunk is to be served. A drafter of any other trunk is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.drafting.rewrite import rewrite
from megatron_mtp.errors import ConversionError, MegatronMTPError

PREFIX = "mtp."
FIELDS = (
    "mtp_num_layers",
    "mtp_use_repeated_layer",
    "mtp_depth_weights",
    "mtp_layer_mlp",
    "mtp_ffn_hidden_size",
)
"""Fields of ModelConfig that come from the drafter's run."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parse(argv)
    try:
        graft(options.source, options.drafter, options.out)
    except MegatronMTPError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


def graft(source: Path, drafter: Path, out: Path) -> None:
    """Writes the trunk of `source` with the MTP layers of `drafter`.

    Raises:
        ConversionError: the trunks differ, or the MTP layers have other shapes.
        CheckpointError: a directory cannot be read or written.
    """
    ours, theirs = StoredWeights(source), StoredWeights(drafter)
    layers = {key: theirs.whole(key) for key in theirs.tensors if key.startswith(PREFIX)}
    if not layers:
        raise ConversionError(f"{theirs.folder}: holds no MTP layers.")
    if others := different(ours, theirs):
        raise ConversionError(
            f"{theirs.folder}: its trunk is not that of {ours.folder}, rounded or not ({others[0]} and "
            f"{len(others) - 1} more differ). Train the drafter from these weights with model.mtp_freeze_trunk=true."
        )
    cfg, trained = ours.config(), theirs.config()
    for name in FIELDS:
        setattr(cfg.model, name, getattr(trained.model, name))
    rewrite(ours, layers, cfg, out, reason="grafted")


def different(ours: StoredWeights, theirs: StoredWeights) -> list[str]:
    """Keys of trunk tensors that differ after rounding to the dtype of `theirs`."""
    found = []
    for key in sorted(key for key in ours.tensors.keys() | theirs.tensors.keys() if not key.startswith(PREFIX)):
        if (
            key not in ours.tensors
            or key not in theirs.tensors
            or ours.shape(key) != theirs.shape(key)
            or any(
                not torch.equal(ours.read(key, offset, size).to(theirs.dtype(key)), theirs.read(key, offset, size))
                for offset, size in ours.boxes(key)
            )
        ):
            found.append(key)
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run directory or checkpoint with the trunk")
    parser.add_argument("--drafter", type=Path, required=True, help="run directory or checkpoint with the MTP layers")
    parser.add_argument("--out", type=Path, required=True, help="run directory to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
