"""A job that loses a rank or a host trains on by itself, on the curve that it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.observe.jsonl import read_metrics
from tests.training.hosts import TIMEOUT_S, missing, steps_done, two_hosts, wait_for_step

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(580)]
AGAIN_S = 30.0
"""From the restart of the ranks to the first step."""
RESTARTED_S = 60.0
"""From the kill to the restart: the other rank must notice, or end when asked to (Watchdog.shorten_timeout)."""
NETWORK_S = 90.0
"""From the return of the network to the next step."""
FIGURES = ("lm loss", "mtp_1 loss", "mtp_2 loss", "grad-norm", "mtp_1/accepted")


def options(folder: Path, steps: int) -> list[str]:
    run = [f"train.train_iters={steps}", "dist.device=cpu", "dist.num_threads=1", "validation.eval_iters=0"]
    run += [f"checkpoint.save={folder}/run", f"checkpoint.load={folder}/run", "checkpoint.save_interval=5"]
    return [*run, f"logger.log_dir={folder}", "checkpoint.most_recent_k=3"]


def launch(folder: Path, launcher: list[str], steps: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", *launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["-m", "megatron_mtp", "pretrain", "tiny_dense", *options(folder, steps)]
    log = (folder / "log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def rank_of(agent: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(agent.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def shards(folder: Path, iteration: int) -> dict[str, str]:
    """Checksums of the files that hold weights, optimizer and random numbers."""
    manifest = RunDirectory(folder / "run").read(iteration)
    return {entry.name: entry.sha256 for entry in manifest.files if entry.name.endswith(".distcp")}


def new_rank(agent: subprocess.Popen, old: set[int], limit_s: float) -> float:
    """Waits for a rank that is not among the old ones. Returns the time at which its process began."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for child in psutil.Process(agent.pid).children():
            with suppress(psutil.Error):
                if child.pid not in old and "RANK" in child.environ():
                    return child.create_time()
        time.sleep(0.05)
    raise TimeoutError(f"no rank was started again in {limit_s} s")


def first_step_of_each_start(folder: Path) -> list[float]:
    """Times at which the first step of each start was done."""
    times, is_first = [], False
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "start":
            is_first = True
        elif line["kind"] == "step" and is_first:
            times.append(line["time"])
            is_first = False
    return times


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "megatron_mtp.launch.agent"])
def test_a_killed_rank_comes_back(tmp_path: Path, launcher: str):
    steps = 60
    assert launch(tmp_path / "whole", [launcher], steps).wait(300) == 0
    folder = tmp_path / "killed"
    begin = time.time()
    agent = launch(folder, [launcher], steps)
    wait_for_step(folder, 12, 200)
    old = {child.pid for child in psutil.Process(agent.pid).children()}
    rank_of(agent, 1).send_signal(signal.SIGKILL)
    killed_at = time.time()
    restarted_at = new_rank(agent, old, RESTARTED_S)
    assert agent.wait(300) == 0, (folder / "log").read_text()[-3000:]

    first, again = first_step_of_each_start(folder)
    took_s = again - restarted_at
    print(f"{launcher}: the first start took {first - begin:.1f} s from the command to the first step")
    print(f"started again {restarted_at - killed_at:.1f} s after the kill, training again {took_s:.1f} s after that")
    # A start is nearly all imports: on a machine that is busy with other things the first one took as long.
    assert took_s < max(AGAIN_S, 1.5 * (first - begin))
    left, right = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert len(left) == len(right) == steps
    assert [[a[n] for n in FIGURES] for a in left] == [[b[n] for n in FIGURES] for b in right]
    assert shards(tmp_path / "whole", steps) == shards(folder, steps) != {}


@pytest.mark.parametrize("host", [0, 1], ids=["the rendezvous host", "the other host"])
def test_a_host_is_cut_off(tmp_path: Path, host: int):
    if reason := missing():
        pytest.skip(f"hosts cannot be cut off: {reason}; both agents run on loopback in the test below")
    with two_hosts(tmp_path) as hosts:
        hosts.start(*options(tmp_path, 100_000), f"dist.distributed_timeout_minutes={TIMEOUT_S / 60}")
        wait_for_step(tmp_path, 12, 200)
        hosts.cut(host)
        time.sleep(2 * TIMEOUT_S)
        stood_at = steps_done(tmp_path)
        hosts.join(host)
        try:
            took_s = wait_for_step(tmp_path, stood_at + 1, NETWORK_S)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{hosts.logs()}")
        print(f"host {host} was cut off at step {stood_at}; training again {took_s:.1f} s after the network was back")
        starts = [line for line in read_metrics(tmp_path / "metrics.jsonl", "start") if line["iteration"]]
        assert starts, "it went on from a checkpoint"


def test_two_agents_make_one_job(tmp_path: Path):
    """Also where no namespaces can be made."""
    with two_hosts(tmp_path) as hosts:
        hosts.start(*options(tmp_path, 10))
        assert [agent.wait(200) for agent in hosts.agents] == [0, 0], hosts.logs()
        if hosts.is_apart:
            assert os.path.exists(f"/var/run/netns/{hosts.name(0)}")
    assert steps_done(tmp_path) == 10
