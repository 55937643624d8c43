"""Addresses of object storage, such as s3://bucket/run, and which of them are known. Text only: nothing is opened.

`pathlib` would take an address for a local folder of that name, so every path is asked here first.
"""

from __future__ import annotations

import re
from pathlib import PurePath

SCHEMES = {"s3": "s3", "gs": "gs", "az": "az", "abfs": "az", "memory": ""}
"""The known kinds of storage, each with the extra of this package that installs its driver. `memory` is part of fsspec
and ends with the process: it is there for tests."""

ADDRESS_RULE = "must be a path on a mounted file system; storage behind an address (...://) is not supported here"
UNKNOWN_RULE = (
    f"is of an unknown kind of storage: addresses begin with {', '.join(f'{name}://' for name in SCHEMES)}; "
    "everything else must be a path on a mounted file system"
)
FORM_RULE = "must name a bucket and a folder in it, without empty parts, '.' or '..', such as s3://BUCKET/FOLDER"
# pathlib makes s3:/bucket of s3://bucket; C:/x has one letter only.
_TEXT = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PATH = re.compile(r"\s*[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def is_address(path: object) -> bool:
    """Whether a path, or text that names one, is an address.

    >>> is_address("s3://bucket/run"), is_address(PurePath("gs://bucket")), is_address("C:/x"), is_address("a:b/c")
    (True, True, False, False)
    """
    return bool(_PATH.match(str(path)) if isinstance(path, PurePath) else _TEXT.match(str(path)))


def address_text(path: object) -> str:
    """An address as it was written, which `pathlib` may have changed.

    >>> address_text(PurePath("s3://bucket/run"))
    's3://bucket/run'
    """
    return str(path).replace(":/", "://", 1) if isinstance(path, PurePath) else str(path)


def split_address(address: object) -> tuple[str, tuple[str, ...]]:
    """Scheme and parts of an address; the first part is the bucket or container.

    >>> split_address("s3://bucket/runs/mine/")
    ('s3', ('bucket', 'runs', 'mine'))
    """
    scheme, _, rest = address_text(address).partition("://")
    return scheme, tuple(rest.removesuffix("/").split("/"))


def address_problem(address: object, *, is_accepted: bool = True) -> str | None:
    """The rule that an address breaks; None: it may be used.

    Args:
        is_accepted: whether this place takes addresses at all.

    >>> address_problem("s3://bucket/run")
    >>> address_problem("s3://bucket//run") == FORM_RULE
    True
    """
    if not is_accepted:
        return ADDRESS_RULE
    scheme, parts = split_address(address)
    if scheme not in SCHEMES:
        return UNKNOWN_RULE
    is_formed = len(parts) > 1 and not {"", ".", ".."} & set(parts)
    return None if is_formed and not re.search(r"[\s?#*\[\]\\]", "/".join(parts)) else FORM_RULE
