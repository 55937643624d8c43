"""`megatron_mtp.main`: a training script ends as the command does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist
SCRIPT = """\
import os, signal, sys
from megatron_mtp import main, pretrain
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback

class Leave(Callback):
    def on_step_end(self, run, state, result):
        if state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

def train(kind):
    cfg = get_recipe("tiny_dense")
    cfg.dist.device, cfg.train.train_iters, cfg.validation.eval_iters = "cpu", 3, 0
    if kind == "mistake":
        cfg.model.mtp_num_layers = -1
    if kind == "crash":
        raise RuntimeError("of the script")
    cfg.checkpoint.save = cfg.checkpoint.load = sys.argv[2]
    return pretrain(cfg, callbacks=[Leave()] if kind == "sigterm" else [])

if __name__ == "__main__":
    main(lambda: train(sys.argv[1]))
"""


def run(folder: Path, kind: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(folder / "train.py"), kind, str(folder / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.parametrize(("kind", "code"), [("whole", 0), ("sigterm", 3), ("mistake", 2), ("crash", 1)])
def test_the_exit_codes_are_those_of_the_command(tmp_path: Path, kind: str, code: int):
    done = run(tmp_path, kind)
    assert done.returncode == code, done.stderr
    if kind == "mistake":
        (line,) = done.stderr.splitlines()
        assert line.startswith("megatron-mtp: model.mtp_num_layers = -1: must be")
    assert ("Traceback" in done.stderr) == (kind == "crash")


def test_under_torchrun_a_mistake_is_said_once(tmp_path: Path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(tmp_path, "mistake", *torchrun)
    assert done.stderr.count("megatron-mtp: model.mtp_num_layers = -1") == 1
    assert "pretrain(cfg" not in done.stderr  # no traceback of the script
