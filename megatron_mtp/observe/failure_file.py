"""The file in which a rank that `--nproc` started leaves the reason of its end, for the parent to choose from."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

FAILURE_DIR = "MEGATRON_MTP_FAILURE_DIR"
"""Environment variable that `--nproc` sets for its ranks: the folder for these files."""
ENDED_BY_ANOTHER = "ended by the watchdog, which another rank reports"


def write_failure(rank: int, text: str, is_mistake: bool) -> bool:
    """Leaves a reason. Returns whether there is a parent that asks for it."""
    folder = os.environ.get(FAILURE_DIR)
    if not folder:
        return False
    record = {"rank": rank, "time": time.time(), "is_mistake": is_mistake, "text": text}
    partial = Path(folder, f"rank{rank}.partial")
    with suppress(OSError):  # the parent falls back to the exit code
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.rename(Path(folder, f"rank{rank}.json"))
    return True
