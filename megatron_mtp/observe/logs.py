"""Python's logging for a training process, and the third-party noise that is kept out of it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LEVEL_VARIABLE = "MEGATRON_MTP_LOG"
"""Environment variable: debug, info (default), warning or error."""

# (message as a regular expression, category, why it is noise)
_WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    (
        r"(Transformer Engine and )?Apex (is|are) not installed",
        UserWarning,
        "the torch backend needs neither; `megatron-mtp doctor` says what is missing",
    ),
    (
        r"invalid escape sequence",
        SyntaxWarning,
        "docstrings of Megatron-Core, shown once when Python compiles them",
    ),
    (r"full scope is deprecated", UserWarning, "Megatron-Core's own default for CUDA graphs, which are not used"),
    (r"MimoModelConfig is experimental", UserWarning, "a model of Megatron-Core that is imported but not used"),
    (
        r"The \.grad attribute of a Tensor that is not a leaf",
        UserWarning,
        "Megatron-Core's optimizer asks shards of parameters for .grad before it looks at .main_grad",
    ),
    (
        r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
        UserWarning,
        "at each resume: Megatron-Core lets every rank read its part of a checkpoint by itself (no_dist), and says so",
    ),
    (
        r"The argument order of load has been changed",
        UserWarning,
        "at each resume: Megatron-Core passes torch's loader its arguments in an older order, which torch understands",
    ),
    (
        r"Please use DTensor instead and we are deprecating ShardedTensor",
        FutureWarning,
        "at each resume: Megatron-Core hands its shards to torch's loader as ShardedTensors",
    ),
)
# (logger, lowest level that is shown, why)
_LOGGERS: tuple[tuple[str, int, str], ...] = (
    ("torch.utils.cpp_extension", logging.ERROR, "says on every machine without a GPU that there is no CUDA runtime"),
    (
        "megatron.core.distributed.distributed_data_parallel",
        logging.ERROR,
        "says that DDP lays out its buffers itself, which is what we want",
    ),
    ("megatron.core.models.gpt.gpt_model", logging.ERROR, "announces its successor for each chunk; docs/decisions.md"),
)


class RankFilter(logging.Filter):
    """Shows all lines of rank 0. Of other ranks it shows errors, and lines logged with `extra={"all_ranks": True}`.

    Lines of other ranks begin with the rank.
    """

    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.where = f"[rank {self._rank}] " if self._rank else ""
        return self._rank == 0 or getattr(record, "all_ranks", False) or record.levelno >= logging.ERROR


class _LineFormatter(logging.Formatter):
    """Info lines as they are; other lines with their level and source."""

    def format(self, record: logging.LogRecord) -> str:
        where = getattr(record, "where", "")
        source = "" if record.levelno == logging.INFO else f"{record.levelname} {record.name}: "
        return f"{where}{source}{super().format(record)}"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: a progress bar replaces it to keep its own line intact."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base class keeps one stream
        return sys.stderr


def setup_logging(rank: int = 0, level: int | str | None = None) -> None:
    """Sends log lines to stderr. A second call changes rank and level; a script's own logging setup is left alone.

    Args:
        rank: global rank of this process.
        level: of this project's loggers; None: the environment variable MEGATRON_MTP_LOG, or info.
    """
    silence_noise()
    chosen = level if level is not None else os.environ.get(LEVEL_VARIABLE, "info").upper()
    ours = logging.getLogger("megatron_mtp")
    try:
        ours.setLevel(chosen)
    except ValueError:
        ours.setLevel(logging.INFO)
        ours.warning(
            "%s=%s is not a log level; info is used. Use debug, info, warning or error.", LEVEL_VARIABLE, chosen
        )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _StderrHandler)]:
        root.removeHandler(handler)
    # A plain StreamHandler is what logging.basicConfig installs: then the script has its own idea of logging.
    if any(type(handler) is logging.StreamHandler for handler in root.handlers):
        return
    handler = _StderrHandler()
    handler.addFilter(RankFilter(rank))
    handler.setFormatter(_LineFormatter())
    root.addHandler(handler)


def silence_noise() -> None:
    """Filters warnings and log lines of other packages that a user cannot act on; the tables above give the reasons.

    Entry points call it, before they import torch and megatron: some packages warn while they are imported.
    """
    for message, category, _ in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, level, _ in _LOGGERS:
        logging.getLogger(name).setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, noise is silenced as by `silence_noise`; afterwards filters and levels are as before."""
    levels = {name: logging.getLogger(name).level for name, _, _ in _LOGGERS}
    with warnings.catch_warnings():
        silence_noise()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
