"""Two starts of one job: one trains, the other is refused or follows it, and nothing of the first is lost."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.data.lock import Lock, Owner
from megatron_mtp.observe.jsonl import read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1800)]
REFUSED = re.compile(r"^megatron-mtp: checkpoint\.save = (.*): is in use by process (\d+) on ", re.MULTILINE)


def start(folder: Path, log: str, *options: str) -> subprocess.Popen:
    arguments = ["dist.device=cpu", "dist.num_threads=1", "validation.eval_iters=0", f"logger.log_dir={folder}/{log}"]
    arguments += [f"checkpoint.save={folder}/run", f"checkpoint.load={folder}/run", *options]
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with (folder / f"{log}.txt").open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def test_a_second_start_is_refused_and_removes_nothing(tmp_path: Path):
    """This process stands for the run that trains; it is in the middle of a save."""
    (tmp_path / "run/iter_0000005.partial").mkdir(parents=True)
    lock = Lock(tmp_path / "run/run.lock", "it")
    list(lock.take(0))
    process = start(tmp_path, "second", "checkpoint.lock_wait_s=1")
    assert process.wait(300) == 2
    text = (tmp_path / "second.txt").read_text()
    assert REFUSED.search(text).groups() == (f"{tmp_path}/run", str(os.getpid()))
    assert "Waiting, 0 of at most 1 s" in text
    assert "Traceback" not in text
    assert sorted(os.listdir(tmp_path / "run")) == ["iter_0000005.partial", "run.lock"]
    lock.check()
    lock.release()


@pytest.mark.slow
def test_two_starts_ten_times(tmp_path: Path):
    """At random times of the first run, with another seed of the data: every checkpoint that is left is the first's."""
    draw = random.Random(20)
    for attempt in range(10):
        (folder := tmp_path / str(attempt)).mkdir()
        options = ("train.train_iters=60", "checkpoint.save_interval=3", "checkpoint.lock_wait_s=1")
        seeds = [("rng.seed=1",), ("rng.seed=2",)]
        processes = [start(folder, "0", *options, *seeds[0])]
        time.sleep(draw.uniform(0, 12) if attempt else 0)
        processes.append(start(folder, "1", *options, *seeds[1]))
        codes = [process.wait(600) for process in processes]
        texts = [(folder / f"{log}.txt").read_text() for log in "01"]
        assert sorted(codes) == [0, 2], texts
        winner, loser = codes.index(0), codes.index(2)
        refusals = REFUSED.findall(texts[loser])
        is_late = "belongs to a run with another config" in texts[loser]  # the first had saved when it looked
        assert len(refusals) + is_late == 1, texts[loser]
        assert refusals in ([], [(f"{folder}/run", str(processes[winner].pid))])
        assert "Traceback" not in texts[0] + texts[1]
        assert "was not saved" not in texts[winner]
        directory = RunDirectory(folder / "run")
        assert directory.iterations() == list(range(60, 0, -3))
        for iteration in directory.iterations():
            assert directory.damages(directory.read(iteration)) == []
            assert f"seed: {winner + 1}\n" in (directory.final_path(iteration) / "config.yaml").read_text()
        assert [step["iteration"] for step in read_metrics(folder / f"{winner}/metrics.jsonl")] == list(range(1, 61))
        assert not list((folder / "run").glob("*.partial"))
        assert not (folder / "run/run.lock").exists()


@pytest.mark.slow
def test_a_requeue_follows_a_run_that_is_about_to_end_and_one_that_was_killed(tmp_path: Path):
    """The first is ended with SIGTERM, the second is killed while the third waits for it."""
    lasting = ("train.train_iters=100000", "checkpoint.save_interval=2", "checkpoint.lock_wait_s=100")
    first = start(tmp_path, "first", *lasting)
    wait_for_lock(tmp_path, first)
    second = start(tmp_path, "second", *lasting)
    wait_for_text(tmp_path / "second.txt", "Waiting", second)
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 3
    wait_for_text(tmp_path / "second.txt", "resumed from", second)
    third = start(tmp_path, "third", "train.train_iters=100000", "train.exit_duration_in_mins=0.01", lasting[2])
    wait_for_text(tmp_path / "third.txt", "Waiting", third)
    second.kill()
    second.wait()
    assert third.wait(300) == 0
    text = (tmp_path / "third.txt").read_text()
    assert f"taken over from process {second.pid} on" in text
    assert "resumed from" in text
    assert "Warning: " not in text, "a resume has no noise"


@pytest.mark.slow
def test_one_whose_machine_was_lost_is_followed(tmp_path: Path):
    (tmp_path / "run").mkdir()
    lost = replace(Owner.this_process(), host="node7", machine="another boot", job="Slurm job 5")
    (tmp_path / "run/run.lock").write_text(json.dumps(asdict(lost)))
    process = start(tmp_path, "second", "train.train_iters=2", "checkpoint.lock_wait_s=1")
    assert process.wait(400) == 0
    text = (tmp_path / "second.txt").read_text()
    assert "on node7 (Slurm job 5, launched" in text
    assert "s without a heartbeat, gone after 120 s" in text


def wait_for_lock(folder: Path, process: subprocess.Popen) -> None:
    wait_for_text(folder / "first.txt", "iteration        2/", process)
    assert json.loads((folder / "run/run.lock").read_text())["pid"] == process.pid


def wait_for_text(path: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()[-3000:]
        assert time.monotonic() < deadline, path.read_text()[-3000:]
        time.sleep(0.1)
