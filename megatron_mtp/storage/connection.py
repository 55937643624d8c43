"""Connections to object storage: which driver, its settings, its errors, and what is tried again.

Two things fail for a moment. A request that is refused (503, throttled), that finds no server or gets no answer in time
is repeated by the driver: for S3 as REQUEST_ATTEMPTS says. An answer that breaks off in its middle is no failed request
to the driver: `again` repeats that.
"""

from __future__ import annotations

import errno
import functools
import importlib
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_mtp.errors import ConfigError, MegatronMTPError, Problem
from megatron_mtp.storage.address import SCHEMES, address_problem, address_text, split_address

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

REQUEST_ATTEMPTS = 9
"""How often a request is made. The pauses between are random, up to 1, 2, 4, 8, 16 and then 20 s: 45 s in total on
average, and at most 91 s."""
ANSWER_ATTEMPTS = 5
"""How often an object is read whose bytes break off."""
CONNECT_S, ANSWER_S = 10.0, 60.0
"""Seconds to connect, and without a byte from the server, after which a request has failed."""
CONNECTIONS = 32
"""Requests of one process at a time; more of them wait."""
PART_BYTES = 50 << 20
"""Size of the parts in which objects are written. S3 takes 10,000 parts: 488 GiB for each rank's file."""

_RANDOM = random.Random()
"""Draws the pauses, the drivers' too: Python's own generator is part of the state of a run, and must not depend on how
often a server was asked."""

_CUT = frozenset("ClientPayloadError IncompleteRead IncompleteReadError ResponseStreamingError".split())
"""Errors of an answer that broke off, by name: the drivers that raise them may not be installed."""


def connect(address: object) -> tuple[AbstractFileSystem, str]:
    """The driver for an address, and the name by which it knows what is there. No request is made.

    Raises:
        ConfigError: it is no address of a known kind, or the package that reads it is not installed.
    """
    text = address_text(address)
    if rule := address_problem(text):
        raise ConfigError(Problem(rule=f"{text}: {rule}"))
    scheme, parts = split_address(text)
    fs = _driver(scheme, parts[0], os.getpid())
    return fs, str(fs._strip_protocol(text))


@functools.cache
def _driver(scheme: str, bucket: str, pid: int) -> AbstractFileSystem:
    """One for each process: a fork must not go on with the connections of its parent."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        retries = {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS}
        timeouts = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S}
        config = {"retries": retries, "max_pool_connections": CONNECTIONS, **timeouts}
        options |= {"config_kwargs": config, "default_block_size": PART_BYTES}
    try:
        fs, _ = fsspec.url_to_fs(f"{scheme}://{bucket}/", **options)
    except ImportError as error:
        rule = f"{scheme}://{bucket}: needs a package that is not installed ({error.name or error})"
        remedy = f"Install it with: pip install 'megatron-mtp[{SCHEMES[scheme]}]'."
        raise ConfigError(Problem(rule=rule, remedy=remedy)) from error
    except Exception as error:  # a driver may look for its credentials at once, and raises what it likes
        raise ConfigError(Problem(rule=f"{scheme}://{bucket}: {_text(error)}")) from error
    if scheme == "s3":
        fs.retries = 1  # botocore repeats requests already, with pauses
        start = importlib.import_module("botocore.retries.standard").ExponentialBackoff.__init__
        start.__defaults__ = tuple(_RANDOM.random if one == random.random else one for one in start.__defaults__)
    elif scheme == "gs":
        setattr(importlib.import_module("gcsfs.retry"), "random", _RANDOM)  # noqa: B010 -- mypy knows no name of it
    return fs


def again[T](read: Callable[[], T]) -> T:
    """The result of a read, which is repeated while its answer breaks off."""
    for attempt in range(1, ANSWER_ATTEMPTS):
        try:
            return read()
        except Exception as error:  # drivers share no base of their errors
            if not _is_cut(error):
                raise
            pause_s = _RANDOM.uniform(0.5, 1) * 0.2 * 2**attempt
            logger.debug("an answer broke off (%s), attempt %d; again in %.1f s", error, attempt, pause_s)
            time.sleep(pause_s)
    return read()


class CutError(OSError):
    """Fewer bytes came than an object has."""


def _is_cut(error: BaseException) -> bool:
    chain = (error, error.__cause__, error.__context__)
    return any(isinstance(one, CutError) or type(one).__name__ in _CUT for one in chain)


class StorageError(MegatronMTPError, OSError):
    """Object storage refused, or cannot be reached. Where nobody handles it, it is a message for the user."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}."


class MissingError(StorageError, FileNotFoundError):
    """Nothing is at an address."""


class PresentError(StorageError, FileExistsError):
    """Something is at an address already."""


class DeniedError(StorageError, PermissionError):
    """The credentials do not allow it."""


def plain_error(error: Exception, address: str) -> StorageError:
    """A driver's error as an OSError whose `strerror` says what is wrong."""
    cause = error.__cause__ or error
    code = (getattr(cause, "response", None) or {}).get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return StorageError(errno.EIO, f"there is no bucket {split_address(address)[1][0]!r}", address)
    if isinstance(error, FileNotFoundError):
        return MissingError(errno.ENOENT, "no such object", address)
    if isinstance(error, FileExistsError):
        return PresentError(errno.EEXIST, "exists already", address)
    if isinstance(error, PermissionError):
        return DeniedError(errno.EACCES, f"permission denied: {_text(error)}", address)
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return StorageError(number, _text(error), address)


def _text(error: Exception) -> str:
    if isinstance(error, StorageError):
        return str(error.strerror)
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.strip().removesuffix(".") or name
