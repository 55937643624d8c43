"""`python -m megatron_mtp`, which writes down its exit code; a program for test_preemption."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

if __name__ == "__main__":
    try:
        runpy.run_module("megatron_mtp", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        Path(os.environ["REPORT_FOLDER"], f"exit_{os.environ['RANK']}").write_text(str(end.code))
        raise
