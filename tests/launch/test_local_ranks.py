"""`pretrain --nproc 2`, as typed: every way to use two ranks trains, on the curve of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtp.observe.jsonl import read_metrics

pytestmark = pytest.mark.dist
STEPS = 4


def curves(folder: Path, *arguments: str) -> list[list[float]]:
    """Losses of every depth for each step of a run of tiny_dense."""
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", "dist.device=cpu", "dist.num_threads=1"]
    options = [f"train.train_iters={STEPS}", "validation.eval_iters=0", f"logger.log_dir={folder}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, *options, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = read_metrics(folder / "metrics.jsonl")
    return [[step[name] for name in ("lm loss", "mtp_1 loss", "mtp_2 loss")] for step in steps]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return curves(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "layout",
    ["", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"],
    ids=["dp2", "tp2", "pp2"],
)
def test_two_ranks_follow_the_curve_of_one(tmp_path: Path, one_rank: list[list[float]], layout: str):
    two_ranks = curves(tmp_path, "--nproc", "2", *layout.split())
    assert len(two_ranks) == STEPS
    for ours, reference in zip(two_ranks, one_rank, strict=True):
        assert ours == pytest.approx(reference, rel=1e-6)
