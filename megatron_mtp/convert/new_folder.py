"""A folder that is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mtp.errors import ConversionError
from megatron_mtp.storage.address import ADDRESS_RULE, is_address


def check_new_folder(path: str | Path) -> Path:
    """The folder to create.

    Raises:
        ConversionError: it is an address, or exists and is not empty.
    """
    if is_address(path):
        raise ConversionError(f"{path}: {ADDRESS_RULE}.")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target}: exists and is not empty. Choose another folder.")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that takes its name at the end; after an error nothing is left.

    Raises:
        ConversionError: the disk refused.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"{target}: cannot be written ({error.strerror or error}).") from error
    except BaseException:  # an interruption too leaves nothing
        shutil.rmtree(partial, ignore_errors=True)
        raise
