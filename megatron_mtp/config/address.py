"""Storage behind an address, such as s3://bucket/run, is not a path: `pathlib` would take it for a local folder."""

from __future__ import annotations

import re
from pathlib import PurePath

ADDRESS_RULE = "must be a path on a mounted file system; storage behind an address (...://) is not supported"
# pathlib makes s3:/bucket of s3://bucket; C:/x has one letter only.
_TEXT = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PATH = re.compile(r"\s*[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def is_address(path: str | PurePath) -> bool:
    """Whether a path is an address.

    >>> is_address("s3://bucket/run"), is_address(PurePath("gs://bucket")), is_address("C:/x"), is_address("a:b/c")
    (True, True, False, False)
    """
    return bool(_TEXT.match(path) if isinstance(path, str) else _PATH.match(str(path)))
