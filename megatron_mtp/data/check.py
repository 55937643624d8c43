"""Compares the files of a data set with the checksums that `prepare` recorded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.errors import DataError


@dataclass(frozen=True, slots=True)
class Checked:
    """A data set in which nothing wrong was found.

    Attributes:
        has_checksums: both files match their checksums; false: none are recorded, and only the index and the sizes were
            checked.
    """

    num_documents: int
    num_tokens: int
    has_checksums: bool


def check_files(prefix: str) -> Checked:
    """Reads `<prefix>.bin` and `.idx` completely.

    Raises:
        DataError: a file is missing or damaged, or is not the one that the sidecar describes.
    """
    reader, sidecar = IndexedReader(prefix), Sidecar.load(prefix)
    problems = [] if sidecar is None else sidecar.mismatches(reader)
    recorded = {} if sidecar is None else {".bin": sidecar.bin_sha256, ".idx": sidecar.idx_sha256}
    for ending, checksum in recorded.items():
        if checksum and not problems and _sha256(Path(f"{prefix}{ending}")) != checksum:
            problems.append(
                f"{prefix}{ending}: its checksum is not the one in {prefix}.json. Copy or prepare it again."
            )
    if problems:
        raise DataError("\n".join(problems))
    return Checked(len(reader), reader.count_tokens(0, len(reader)), bool(recorded) and all(recorded.values()))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
