"""Documents from JSONL files: plain, gzip or Zstandard; one JSON object on each line. Lists inputs of every format."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import zstandard

from megatron_mtp.data.files import stat_file
from megatron_mtp.data.prepare.documents import Document
from megatron_mtp.data.prepare.tables import DATASET_FILES, TABLE_ENDINGS, one_split, read_rows, saved_files
from megatron_mtp.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
# Bytes of text in one byte of the file, for the memory estimate of a shuffle; measured on English web text.
_EXPANSION = {".gz": 3.0, ".zst": 3.5, ".parquet": 2.5}
_LINE_BYTES = 1 << 30  # the length of a document is stored in an int32; a damaged archive may expand without end


def list_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The JSONL, Parquet and Arrow files in `inputs`.

    Folders are searched with their subfolders, and their files are sorted; a folder of `Dataset.save_to_disk` says
    itself what it holds.

    Raises:
        DataError: an input does not exist or has another format, a folder holds none, or files of several splits.
    """
    found: list[Path] = []
    for path in map(Path, inputs):
        try:
            found += _files_of(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file or folder.") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    doubled = {str(path) for path in found if found.count(path) > 1} if len(set(found)) < len(found) else None
    if doubled:
        raise DataError(f"{', '.join(sorted(doubled))}: given more than once.")
    return found


def _files_of(path: Path) -> list[Path]:
    """The file `path`, or those in the folder `path`."""
    if path.is_dir():
        if (saved := saved_files(path)) is not None:
            return saved
        found = (file for file in path.rglob("*") if file.name.endswith((*ENDINGS, ".parquet")) and file.is_file())
        inside = sorted(file for file in found if file.name not in DATASET_FILES)
        if not inside:
            raise DataError(f"{path}: holds no file that ends in {', '.join((*ENDINGS, '.parquet'))}.")
        return one_split(path, inside)
    stat_file(path)
    if not path.name.endswith((*ENDINGS, *TABLE_ENDINGS)):
        raise DataError(f"{path}: has another format; its name must end in {', '.join((*ENDINGS, *TABLE_ENDINGS))}.")
    return [path]


def text_bytes(path: Path) -> int:
    """Approximate number of bytes of text in a file."""
    return int(path.stat().st_size * _EXPANSION.get(path.suffix, 1.0))


def read_documents(
    path: Path,
    key: str = "text",
    on_bad_line: Callable[[str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The texts of a file in order. Blank lines are skipped.

    Args:
        key: field of each object, or column, that holds the text.
        on_bad_line: called with the problem of a line that is not an object with a text; None: such a line is an error.
        on_progress: called with the number of bytes read since the last call.

    Raises:
        DataError: a line is malformed (names its number), or the file cannot be read to its end.
    """
    if path.suffix in TABLE_ENDINGS:
        yield from read_rows(path, key, on_bad_line, on_progress)
        return
    reported = 0
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as lines:
            for number, line in enumerate(iter(partial(lines.readline, _LINE_BYTES), b""), 1):
                if on_progress and raw.tell() - reported > 1 << 20:
                    on_progress(raw.tell() - reported)
                    reported = raw.tell()
                if line.isspace():
                    continue
                if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
                    problem: str | None = f"is longer than {_LINE_BYTES:,} bytes"
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(_LINE_BYTES)
                else:
                    text, problem = _text_of(line, key)
                if problem is None:
                    yield Document(number, text)
                elif on_bad_line is None:
                    raise DataError(f"{path}:{number}: {problem}. Fix the line, or pass --skip-bad-lines.")
                else:
                    on_bad_line(f"{path}:{number}: {problem}")
            if on_progress:
                on_progress(raw.tell() - reported)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}). It is truncated or damaged.") from error


def _text_of(line: bytes, key: str) -> tuple[str, str | None]:
    """The text of a line, and its problem if it has one."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return "", f"is not JSON ({error})"
    except RecursionError:
        return "", "is nested too deeply"
    if not isinstance(value, dict) or key not in value:
        return "", f"is not an object with the key {key!r} (see --json-key)"
    if not isinstance(value[key], str):
        return "", f"its {key!r} is {type(value[key]).__name__}, not a text"
    return _without_lone_surrogates(value[key]), None


def _without_lone_surrogates(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON may hold but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as file:
            yield io.BufferedReader(file, 1 << 20)
    elif path.suffix == ".zst":
        yield io.BufferedReader(_ZstdFile(raw), 1 << 20)
    else:
        yield raw


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame. Unlike zstandard's own stream it reports a file that ends inside a frame."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest, self._ready = b"", memoryview(b"")  # a view, so that a rest is not copied

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._decompress_more():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress_more(self) -> bool:
        """Decompresses one piece; false at the end of the file."""
        piece, self._rest = self._rest or self._raw.read(1 << 17), b""
        if not piece:
            if self._frame is not None:
                raise EOFError("the file ends within a Zstandard frame")
            return False
        frame = self._frame = self._frame or self._new_frame()
        try:
            self._ready = memoryview(frame.decompress(piece))
        except self._error as error:
            raise EOFError(str(error)) from error
        if frame.eof:
            self._frame, self._rest = None, frame.unused_data
        return True
