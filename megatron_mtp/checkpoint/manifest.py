"""The manifest of a checkpoint: every file with size and checksum, and what must be known before any of them is read.

A directory is a complete checkpoint if and only if its manifest is intact and every file it lists is. Only JSON is
parsed to find that out. Imports neither torch nor megatron.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place
from megatron_mtp.storage.remote_path import RemotePath

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.yaml"
TRAIN_STATE_NAME = "train_state.json"
METADATA_NAME = ".metadata"
SMALL_NAMES = (CONFIG_NAME, TRAIN_STATE_NAME)

REQUIRED_NAMES = (*SMALL_NAMES, METADATA_NAME, "metadata.json")
"""What every checkpoint has; `read_metadata` asks for the shards that its metadata leads to."""

MAX_BYTES = 64 << 20
"""Maximum size of a manifest. It holds a line or two for each file; a longer file was not written here."""

# Loaders of older formats read these if they exist, whether or not we wrote them.
_FORBIDDEN_NAMES = ("common.pt",)
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: name inside its directory, bytes, and SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses of one evaluation, nats per token.

    Args:
        main_loss: of the first validation set; None: there was no evaluation.
        losses: of every set and depth with valid targets, by "SET/LOSS", such as "docs/mtp_1 loss".
    """

    main_loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)

    def loss_by(self, metric: str | None) -> float | None:
        """The loss that checkpoint.best_metric = `metric` names; None: it was not evaluated."""
        return self.main_loss if metric is None else self.losses.get(metric)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds and what wrote it."""

    iteration: int
    files: list[FileEntry]
    format_version: int = FORMAT_VERSION
    consumed_samples: int = 0
    world_size: int = 1
    reason: str = "interval"
    """Why it was saved, such as "interval", "end of training", "lowest validation/lm loss" or "imported"."""
    saved_at: str = ""
    """ISO 8601, UTC."""
    validation_loss: float | None = None
    """Main loss of the first validation set at this iteration, nats per token; None: there was no evaluation."""
    validation_losses: dict[str, float] = field(default_factory=dict)
    """All losses of that evaluation, by "SET/LOSS"; empty in checkpoints of earlier releases."""
    best_metric: str | None = None
    """checkpoint.best_metric of the run."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None where the run has none."""
    data: list[str] = field(default_factory=list)
    """Fingerprint of the files of each prefix of the training data, in the order of the blend; empty: not known."""
    versions: dict[str, str] = field(default_factory=dict)
    """Python and packages that wrote it."""

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation at this iteration."""
        return Evaluation(self.validation_loss, self.validation_losses)

    def with_evaluation(self, evaluation: Evaluation) -> Manifest:
        """The same, with these losses."""
        return replace(self, validation_loss=evaluation.main_loss, validation_losses=evaluation.losses)

    def to_bytes(self) -> bytes:
        """The file: canonical JSON with its own checksum, so that no byte of it can change unnoticed."""
        body = asdict(self)
        digest = hashlib.sha256(_canonical(body)).hexdigest()
        return _canonical({"manifest": body, "sha256": digest})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: a byte differs from what `to_bytes` wrote, or a field is unknown or of another kind.
        """
        try:
            outer = json.loads(raw)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if (
            not isinstance(outer, dict)
            or set(outer) != {"manifest", "sha256"}
            or not isinstance(outer["manifest"], dict)
        ):
            raise ValueError("it is not a manifest")
        body = outer["manifest"]
        if hashlib.sha256(_canonical(body)).hexdigest() != outer["sha256"] or _canonical(outer) != raw:
            raise ValueError("its checksum does not match")
        if body.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {body.get('format_version')!r} is not {FORMAT_VERSION}")
        unknown = set(body) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        found = cls(**{**body, "files": [FileEntry(**entry) for entry in body["files"]]})
        found._check()
        return found

    def _check(self) -> None:
        """Checks the values: an attacker who writes a manifest writes its checksum too."""
        for name in ("iteration", "consumed_samples", "world_size"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r} is not a count")
        if not (self.validation_loss is None or _is_number(self.validation_loss)):
            raise ValueError(f"validation_loss = {self.validation_loss!r} is not a number")
        losses = self.validation_losses
        if not isinstance(losses, dict) or not all(map(_is_number, losses.values())):
            raise ValueError(f"validation_losses = {losses!r} are not numbers by name")
        for name in ("tokenizer", "best_metric"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} = {getattr(self, name)!r} is not a string")
        if not isinstance(self.data, list) or not all(isinstance(one, str) for one in self.data):
            raise ValueError("data is not a list of strings")
        for entry in self.files:
            if not _FILE_NAME.fullmatch(entry.name) or entry.name in (".", "..", MANIFEST_NAME):
                raise ValueError(f"file name {entry.name!r} leads out of the directory")
            if not is_count(entry.size) or not _DIGEST.fullmatch(entry.sha256):
                raise ValueError(f"size or checksum of {entry.name} is invalid")
        if missing := sorted(set(REQUIRED_NAMES) - {entry.name for entry in self.files}):
            raise ValueError(f"it does not list {', '.join(missing)}")


def is_count(value: Any) -> bool:
    """Whether a value from a JSON file is an integer of at least 0; true and false are integers to Python."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _canonical(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(directory: Place) -> Manifest:
    """Reads the manifest of a checkpoint directory and checks that every file is there at its size.

    Checksums are not compared: `damage` does that, file by file, so that ranks can share the work.

    Raises:
        CheckpointError: the directory is not a complete checkpoint; names the file.
    """
    path = directory / MANIFEST_NAME
    try:
        look = _looking(directory)
        if problem := _kind_problem(look(MANIFEST_NAME), MAX_BYTES):
            raise ValueError(problem)
        manifest = Manifest.from_bytes(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}).") from error
    for name in _FORBIDDEN_NAMES:
        with suppress(OSError):
            look(name)
            raise CheckpointError(
                f"{directory / name}: does not belong to this checkpoint and would be read as part of it."
            )
    for entry in manifest.files:
        problem = _size_problem(directory, entry, look)
        if problem:
            raise CheckpointError(problem)
    return manifest


def read_verified(directory: Place) -> Manifest:
    """`read_manifest`, with every byte compared. For one process that reads a checkpoint alone.

    Raises:
        CheckpointError: the checkpoint is damaged; names every file.
    """
    manifest = read_manifest(directory)
    if problems := [text for entry in manifest.files if (text := damage(directory, entry))]:
        raise damage_error(directory, problems)
    return manifest


def damage_error(directory: Place, problems: list[str], older: Place | None = None) -> CheckpointError:
    """The error of a reader that needs this checkpoint and no other.

    Args:
        older: a checkpoint that could be read in its place.
    """
    such_as = f", such as {older}" if older else ""
    remedy = f"Restore it, or name another checkpoint by its folder{such_as}."
    return CheckpointError("\n".join([f"{directory}: the checkpoint is damaged. {remedy}", *problems]))


def damage(directory: Place, entry: FileEntry) -> str | None:
    """The problem of one file, whose size and checksum are compared with the manifest; None: it is intact."""
    if problem := _size_problem(directory, entry, lambda name: (directory / name).stat()):
        return problem
    path = directory / entry.name
    try:
        found = hash_file(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})."
    return None if found == entry.sha256 else f"{path}: its checksum does not match the manifest."


def _looking(directory: Place) -> Callable[[str], os.stat_result]:
    """How to look at files of a folder by name: one by one, or, of objects, by one listing of all."""
    if not isinstance(directory, RemotePath):
        return lambda name: (directory / name).stat()
    entries = directory.entries()

    def look(name: str) -> os.stat_result:
        if name not in entries:
            raise FileNotFoundError(errno.ENOENT, "no such object")
        return entries[name]

    return look


def _size_problem(directory: Place, entry: FileEntry, look: Callable[[str], os.stat_result]) -> str | None:
    path = directory / entry.name
    try:
        found = look(entry.name)
    except OSError as error:
        return f"{path}: is missing ({error.strerror})."
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
        return f"{path}: is not a file."
    return (
        None if found.st_size == entry.size else f"{path}: has {found.st_size} bytes, the manifest says {entry.size}."
    )


def _kind_problem(found: os.stat_result, max_bytes: int) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "it is not a file"
    return None if found.st_size <= max_bytes else f"it has {found.st_size} bytes"


def hash_file(path: Place) -> str:
    """SHA-256 of a file in hex. Releases the interpreter while it hashes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
