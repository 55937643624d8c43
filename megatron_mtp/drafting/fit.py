"""Writes a checkpoint whose new MTP layers have projections fitted to the model, before any training.

    megatron-mtp convert import MODEL runs/base --recipe smollm2_135m --mtp-init last_layer
    python -m megatron_mtp.drafting.continuations runs/base --data train.jsonl --out runs/self/train
    python -m megatron_mtp.drafting.fit runs/base --data runs/self/train --out runs/fitted

--data names .bin/.idx files with text that the model or somebody else wrote. The fit: decode/projection.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.convert.load import is_hf_folder
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.decode.projection import FittedProjection, fit_projections
from megatron_mtp.drafting.decoder import open_decoder
from megatron_mtp.drafting.rewrite import rewrite
from megatron_mtp.errors import ConversionError, DataError, MegatronMTPError

HELD_OUT = 20
"""One in this many documents is held out to count agreement on."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parse(argv)
    try:
        for number, fit in enumerate(run(options), start=1):
            print(
                f"depth {number}: {fit.unexplained:.1%} of the layer's usual input unexplained; drafts agree with the "
                f"model at {fit.agreement:.1%} of held-out slots"
            )
    except MegatronMTPError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


def run(options: argparse.Namespace) -> list[FittedProjection]:
    """Fits the projections and writes the checkpoint.

    Raises:
        ConversionError, CheckpointError, DataError, UnsupportedError: the model or the text does not fit.
    """
    if is_hf_folder(options.source):
        raise ConversionError(
            f"{options.source}: is a Hugging Face folder. Import it first: megatron-mtp convert import."
        )
    stored = StoredWeights(options.source)
    with open_decoder(options.source, device=options.device, threads=options.threads) as loaded:
        documents = read_pieces(options.data, options.documents, loaded.cfg.model.seq_length)
        known, highest = loaded.decoder.vocab_size, max(max(ids) for ids in documents)
        if highest >= known:
            raise DataError(f"--data: has ids up to {highest}; the model knows 0 to {known - 1}.")
        held_out = documents[HELD_OUT - 1 :: HELD_OUT]
        fitted = fit_projections(
            loaded.decoder, [ids for place, ids in enumerate(documents) if place % HELD_OUT != HELD_OUT - 1], held_out
        )
    weights = {}
    for index, fit in enumerate(fitted):
        prefix = f"mtp.layers.{index}."
        scales = torch.cat([stored.whole(f"{prefix}{norm}.weight").float() for norm in ("enorm", "hnorm")])
        weights[f"{prefix}eh_proj.weight"] = fit.weight / (scales + stored.config().model.layernorm_zero_centered_gamma)
    rewrite(stored, weights, stored.config(), Path(options.out), reason="fitted")
    return fitted


def read_pieces(prefixes: Sequence[str], most: int, context: int) -> list[list[int]]:
    """Beginnings of documents, at most `context` tokens long, from all data sets in turn."""
    readers = [(reader, reader.lengths()) for reader in map(IndexedReader, prefixes)]
    found = (
        reader.read(number, 0, min(context, int(lengths[number]))).tolist()
        for number in range(max(len(reader) for reader, _ in readers))
        for reader, lengths in readers
        if number < len(lengths) and lengths[number] > 1
    )
    pieces = list(islice(found, most))
    if len(pieces) < HELD_OUT:
        raise DataError(f"--data: has {len(pieces)} documents of two tokens or more; a fit needs at least {HELD_OUT}.")
    return pieces


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run directory or checkpoint, imported with --mtp-init last_layer")
    parser.add_argument("--data", required=True, action="append", help="prefix of .bin/.idx files; repeatable")
    parser.add_argument("--out", required=True, help="run directory to write")
    parser.add_argument("--documents", type=int, default=1000, help="documents to read")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
