"""Slurm jobs under a stand-in scheduler, from the submission over a preemption to the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.doctor.node import checkpoint_bytes
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from tests.harness.scheduler import StandIn

pytestmark = pytest.mark.dist
STEPS = 20
SCRIPT = """\
import sys
from megatron_mtp import main, pretrain
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.recipes import get_recipe

def train():
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, sys.argv[1:])
    return pretrain(cfg)

if __name__ == "__main__":
    main(train)
"""


def options(folder: Path) -> list[str]:
    run = f"{folder}/run"
    fields = {"train.train_iters": STEPS, "checkpoint.save": run, "checkpoint.load": run, "dataset.mock": "true"}
    fields |= {"dist.device": "cpu", "dist.num_threads": 1, "validation.eval_iters": 0}
    return [f"{name}={value}" for name, value in fields.items()]


def submit(stand_in: StandIn, *arguments: str) -> subprocess.CompletedProcess[str]:
    sizes = ["--nodes", "2", "--gpus-per-node", "1"]
    command = [sys.executable, "-m", "megatron_mtp", "launch", "slurm", *sizes, *arguments]
    return subprocess.run(command, env=stand_in.environment, capture_output=True, text=True, check=False, timeout=60)


def shards(folder: Path) -> dict[str, str]:
    """Checksums of the files of the last checkpoint that hold weights, optimizer and random numbers."""
    manifest = RunDirectory(folder / "run").read(STEPS)
    return {entry.name: entry.sha256 for entry in manifest.files if entry.name.endswith(".distcp")}


def run(folder: Path, program: list[str], *, is_preempted: bool) -> StandIn:
    """Submits a job, runs it to its end, and returns the scheduler."""
    folder.mkdir()
    stand_in, metrics = StandIn(folder / "slurm"), folder / "run.metrics.jsonl"
    setup = folder / "set up.sh"
    setup.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    environment = ["--env", "PYTHONPATH", "--setup", str(setup), "--logs", f"{folder}/logs"]
    done = submit(stand_in, *environment, *program, *options(folder))
    assert (done.returncode, done.stdout) == (0, "submitted job 71\n"), done.stderr

    def has_trained() -> bool:
        return metrics.exists() and len(read_metrics(metrics)) >= 4

    code = stand_in.run(71, preempt_when=has_trained if is_preempted else None)
    assert code == 0, stand_in.log(71)[-3000:]
    return stand_in


@pytest.mark.slow
@pytest.mark.timeout(580)
@pytest.mark.parametrize("kind", ["recipe", "script"])
def test_a_preempted_job_ends_as_an_undisturbed_one(tmp_path: Path, kind: str):
    (tmp_path / "train.py").write_text(SCRIPT)
    program = ["tiny_dense"] if kind == "recipe" else ["--script", str(tmp_path / "train.py"), "--cpu", "--"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, program, is_preempted=False).codes == [0]
    stand_in = run(cut, program, is_preempted=True)
    assert stand_in.codes == [3, 0], stand_in.log(71)[-3000:]
    assert shards(whole) == shards(cut)
    done = {record["iteration"] for record in read_metrics(cut / "run.metrics.jsonl")}
    assert done == set(range(1, STEPS + 1))
    assert "preempted: requeued" in stand_in.log(71)
    assert "[rank 0] " in stand_in.log(71)
    for start in ("71.0", "71.1"):
        for node in ("node0", "node1"):
            assert list((cut / "logs" / start / node).glob("*/attempt_0/0/stdout.log"))
    if kind == "recipe":
        size = sum(file.stat().st_size for file in RunDirectory(whole / "run").final_path(STEPS).iterdir())
        assert checkpoint_bytes(get_recipe("tiny_dense").finalize()) == pytest.approx(size, rel=0.2)


def test_a_node_that_misses_the_data_ends_the_job_before_its_ranks(tmp_path: Path):
    stand_in = StandIn(tmp_path / "slurm")
    chosen = [option for option in options(tmp_path) if "mock" not in option]
    done = submit(stand_in, "tiny_dense", *chosen, "dataset.blend=[/none/web]")
    assert "dataset.blend = /none/web: this machine sees no /none/web.bin. The nodes must." in done.stderr
    assert stand_in.run(71) == 2
    for node in ("node0", "node1"):
        assert f"{node}: dataset.blend = '/none/web': there is no /none/web.bin here." in stand_in.log(71)
    assert not (tmp_path / "run.logs").exists()


def test_a_chain_of_jobs(tmp_path: Path):
    stand_in = StandIn(tmp_path / "slurm")
    done = submit(stand_in, "tiny_dense", "--chain", "3", "--after", "7", *options(tmp_path))
    assert done.stdout == "submitted job 71\nsubmitted job 72\nsubmitted job 73\n", done.stderr
    assert [stand_in.option(job, "dependency") for job in (71, 72, 73)] == ["afterok:7", "afterok:71", "afterok:72"]
    assert [stand_in.option(job, "kill-on-invalid-dep") for job in (71, 72, 73)] == ["yes"] * 3
