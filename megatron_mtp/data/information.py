"""What a data set holds, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.object_file import ObjectCache
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.errors import DataError

PERCENTILES = {"min": 0, "10 %": 10, "median": 50, "90 %": 90, "99 %": 99, "max": 100}


def describe(prefix: str, cache: ObjectCache | None = None) -> dict[str, Any]:
    """Documents, tokens, type, tokenizer (None: there is no sidecar), and tokens of a document: mean and percentiles.

    Args:
        cache: for an address.

    Raises:
        DataError: the files are missing or damaged, or the sidecar is not theirs.
    """
    reader, sidecar = IndexedReader(prefix, cache), Sidecar.load(prefix)
    if sidecar is not None and (problems := sidecar.mismatches(reader)):
        raise DataError("\n".join(problems))
    tokens = reader.lengths()
    found = np.percentile(tokens, list(PERCENTILES.values()), method="lower")
    lengths = dict(zip(PERCENTILES, map(int, found), strict=True)) | {"mean": float(np.mean(tokens))}
    return {
        "prefix": prefix,
        "documents": len(reader),
        "tokens": reader.count_tokens(0, len(reader)),
        "dtype": str(reader.dtype),
        "bytes": reader.bin_size,
        "lengths": lengths,
        "tokenizer": None if sidecar is None else sidecar.tokenizer_fingerprint,
        "vocab_size": None if sidecar is None else sidecar.vocab_size,
        "eod": None if sidecar is None else sidecar.eod,
        "append_eod": None if sidecar is None else sidecar.append_eod,
        "largest_id": None if sidecar is None else sidecar.largest_id,
    }
