"""A checkpoint of an earlier release, with its config.yaml, opens at another layout and goes on as that release did.

tests/fixtures/checkpoint_0281f79 was written at commit 0281f79: four steps of eight of a small mixture of experts with
one MTP layer at pp=2, and the continuation at tp=2, ep=2 as that commit computed it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0281f79"
LAYOUT = (
    "model.pipeline_model_parallel_size=1",
    "model.tensor_model_parallel_size=2",
    "model.sequence_parallel=true",
    "model.expert_model_parallel_size=2",
    "model.expert_tensor_parallel_size=1",
)
TOLERANCE = 1e-5
"""Relative, of each loss and gradient norm: processors round differently."""


@pytest.mark.dist
def test_it_opens_at_another_layout_and_goes_on(tmp_path: Path):
    with tarfile.open(FIXTURE / "checkpoint.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = tmp_path / "saved" / "iter_0000004" / "config.yaml"
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_moe", "--nproc", "2"]
    environment = {**os.environ, "PYTHONPATH": str(FIXTURE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--config", str(config), *LAYOUT],
        cwd=tmp_path,  # the config names folders of this one
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    names = ("iteration", "lm loss", "mtp_1 loss", "grad-norm")
    steps = [[record[name] for name in names] for record in records if record["kind"] == "step"]
    lines = (FIXTURE / "continuation.txt").read_text().splitlines()[1:]
    expected = [[float(word) for word in line.split()] for line in lines]
    assert len(steps) == len(expected) == 4
    for got, wanted in zip(steps, expected, strict=True):
        assert got == pytest.approx(wanted, rel=TOLERANCE)
