"""Compares the files of a data set with the checksums that `prepare` recorded."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.object_file import ObjectCache
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


def check_files(prefix: str, cache: ObjectCache | None = None) -> Checked:
    """Reads `<prefix>.bin` and `.idx` completely.

    Args:
        cache: for an address.

    Raises:
        DataError: a file is missing or damaged, or is not the one that the sidecar describes.
    """
    reader, sidecar = IndexedReader(prefix, cache), Sidecar.load(prefix)
    problems = [] if sidecar is None else sidecar.mismatches(reader)
    recorded = [] if sidecar is None else [sidecar.idx_sha256, sidecar.bin_sha256]
    for file, checksum in zip(reader.files, recorded, strict=False):
        if checksum and not problems and file.sha256() != checksum:
            problems.append(f"{file.name}: its checksum is not the one in {prefix}.json. Copy or prepare it again.")
    if problems:
        raise DataError("\n".join(problems))
    return Checked(len(reader), reader.count_tokens(0, len(reader)), bool(recorded) and all(recorded))
