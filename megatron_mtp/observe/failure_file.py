"""The file in which a rank started by `--nproc` leaves the reason of its failure, for the parent process to report."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

FAILURE_DIR = "MEGATRON_MTP_FAILURE_DIR"
"""Environment variable that `--nproc` sets for its ranks: the folder for these files."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank ended.

    Args:
        rank: global rank.
        text: for the user.
        kind: `mistake`: the user's, explained without a traceback; `crash`: anything else; `echo`: a consequence of
            another rank's end.
        time: seconds since 1970.
    """

    rank: int
    text: str
    kind: Literal["mistake", "crash", "echo"]
    time: float = field(default_factory=time.time)

    def write(self) -> bool:
        """Writes the file. Returns whether there is a parent process that reads it."""
        folder = os.environ.get(FAILURE_DIR)
        if not folder:
            return False
        partial = _path(folder, self.rank).with_suffix(".partial")
        with suppress(OSError):  # then the parent reports the exit code only
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
            partial.rename(_path(folder, self.rank))
        return True

    @classmethod
    def read(cls, folder: Path, rank: int) -> Failure | None:
        """What the rank wrote; None if it was killed before it could."""
        with suppress(OSError, ValueError):
            return cls(**json.loads(_path(folder, rank).read_text(encoding="utf-8")))
        return None


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"rank{rank}.json")
