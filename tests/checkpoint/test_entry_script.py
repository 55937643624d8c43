"""Saving from a script without a `__main__` guard does not import the script again, which used to hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

SCRIPT = """
import sys
print("imported", flush=True)
import torch.distributed as dist
from megatron_mtp.device import cpu_facade
cpu_facade.install("cpu")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from tests.checkpoint.rig import DENSE, resumed, trained
for is_async in (False, True):
    values = {**DENSE, "checkpoint.async_save": is_async}
    path = f"{sys.argv[1]}/{is_async}"
    trained(values, 1, path, 1)
    assert resumed(values, 1, path)[0] == 1
print("done", flush=True)
"""


def test_a_script_without_a_guard_saves_and_resumes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["imported", "done"]
