"""Documents from Parquet and Arrow files, and from folders of the Hugging Face `datasets` library.

pyarrow reads them; it is an optional extra, since JSONL needs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mtp.data.prepare.documents import Document
from megatron_mtp.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLE_ENDINGS = (".parquet", ".arrow")
DATASET_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the library writes beside data; no file of documents."""
_ROWS = 1024  # read at a time
_SPLIT = re.compile(r"(train|test|validation|valid|dev)[-.].*\.parquet")


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `Dataset.save_to_disk` wrote; None: it is none.

    Raises:
        DataError: it holds several splits, or its list of files is damaged.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if len(splits) != 1:
                raise DataError(f"{folder}: holds the splits {', '.join(splits)}. Give one: {folder / splits[0]}.")
            return saved_files(folder / splits[0])
        if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
            return None
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [folder / entry["filename"] for entry in listed]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{folder}: its dataset_dict.json or state.json cannot be read ({error!r}).") from error


def one_split(folder: Path, files: list[Path]) -> list[Path]:
    """The files themselves, which must not be of several splits.

    Raises:
        DataError: they are; a model would be trained on what it is evaluated with.
    """
    splits = {match[1] for file in files if (match := _SPLIT.fullmatch(file.name))}
    if len(splits) > 1:
        chosen = sorted(splits, key=lambda name: name != "train")
        raise DataError(
            f"{folder}: holds files of the splits {', '.join(chosen)}. Give those of one, such as "
            f"{folder}/.../{chosen[0]}-*.parquet."
        )
    return files


def read_rows(
    path: Path,
    key: str,
    on_bad_row: Callable[[str], None] | None,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Document]:
    """The texts of a column in order; rows are counted from 1. Arguments and errors as `read_documents`."""
    pyarrow = _pyarrow(path)
    size, row, reported = path.stat().st_size, 0, 0
    try:
        batches, total = _batches(path, key)
        for batch in batches:
            for text in batch.to_pylist():
                row += 1
                if isinstance(text, str):
                    yield Document(row, text)
                elif on_bad_row is None:
                    raise DataError(f"{path}:{row}: its {key!r} is null. Fix the row, or pass --skip-bad-lines.")
                else:
                    on_bad_row(f"{path}:{row}: its {key!r} is null")
            if on_progress and total:
                on_progress(size * row // total - reported)
                reported = size * row // total
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}). It is truncated or damaged.") from error
    if on_progress:
        on_progress(size - reported)


def _batches(path: Path, key: str) -> tuple[Iterator[Any], int]:
    """Parts of the column, and the number of all rows; 0: not known."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(path, file.schema_arrow, key)
        rows = file.iter_batches(batch_size=_ROWS, columns=[key])
        return (batch.column(0) for batch in rows), file.metadata.num_rows
    source = pyarrow.memory_map(str(path))
    try:
        stream: Any = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
        opened = pyarrow.ipc.open_file(source)
        _check_column(path, opened.schema, key)
        return (opened.get_batch(n).column(key) for n in range(opened.num_record_batches)), 0
    _check_column(path, stream.schema, key)
    return (batch.column(key) for batch in stream), 0


def _check_column(path: Path, schema: pyarrow.Schema, key: str) -> None:
    import pyarrow

    if key not in schema.names:
        raise DataError(f"{path}: has no column {key!r}, only {', '.join(schema.names)} (see --json-key).")
    kind = schema.field(key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise DataError(f"{path}: its column {key!r} is {kind}, not text (see --json-key).")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet and Arrow files needs pyarrow. Install it with "
            "pip install 'megatron-mtp[parquet]'."
        ) from error
    return pyarrow
