"""Runs whose checkpoints are on an S3 server equal runs on files, whatever the server and the process go through."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.errors import CheckpointError, ConfigError, NotSavedError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.storage import connection
from megatron_mtp.storage.place import place
from megatron_mtp.training import loop
from tests.harness.s3 import Bucket, Fault
from tests.training.test_pretrain import tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1800)]
LOSSES = ("lm loss", "mtp_1 loss", "grad-norm", "learning-rate")


def config(folder: Path, run: str, **checkpoint: object):
    cfg = tiny(folder, train_iters=6)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = cfg.checkpoint.load = run
    cfg.checkpoint.save_interval = 2
    cfg.checkpoint.update(**checkpoint)
    return cfg


def curve(folder: Path) -> list[list[float]]:
    """Losses and norms of each step."""
    return [[step.get(name) for name in LOSSES] for step in read_metrics(folder / "metrics.jsonl")]


def shards(run: str) -> dict[int, dict[str, str]]:
    """Checksums of the tensors of each checkpoint, as its manifest has them, and as they are."""
    directory = RunDirectory(run)
    manifests = [directory.read(iteration) for iteration in directory.iterations()]
    assert [problem for manifest in manifests for problem in directory.damages(manifest)] == []
    return {m.iteration: {f.name: f.sha256 for f in m.files if f.name.endswith(".distcp")} for m in manifests}


@pytest.fixture(scope="module")
def on_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], dict[int, dict[str, str]]]:
    """Curve and tensors of a run on files."""
    folder = tmp_path_factory.mktemp("files")
    assert pretrain(config(folder, str(folder / "run"))).exit_code == 0
    return curve(folder), shards(str(folder / "run"))


@pytest.mark.parametrize("is_async", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_on_object_storage_is_the_run_on_files(tmp_path: Path, s3: Bucket, on_files, is_async: bool):
    cfg = config(tmp_path, s3.address(), async_save=is_async)
    assert pretrain(cfg).exit_code == 0
    assert (curve(tmp_path), shards(s3.address())) == on_files
    assert {"run.lock", "begun"}.isdisjoint({path.name for path in s3.place().iterdir()})
    assert not list(Path.cwd().glob("s3:*"))


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_changes_nothing(tmp_path: Path, s3: Bucket, on_files):
    """Every seventh write and eighth read is refused or throttled, others are slow, or cut in the middle."""
    for method, every in (("PUT", 7), ("GET", 8)):
        s3.inject(Fault(method, status=503, every=every))
        s3.inject(Fault(method, status=503, code="SlowDown", every=every + 4))
        s3.inject(Fault(method, delay_s=0.5, every=every + 6))
    s3.inject(Fault("PUT", cut_request=True, every=9))
    s3.inject(Fault("GET", "distcp", cut_at=5000, every=5))
    cfg = config(tmp_path, s3.address(), async_save=True)
    cfg.train.exit_interval = 4
    assert pretrain(cfg).state.iteration == 4
    cfg.train.exit_interval = None
    assert pretrain(cfg).state.iteration == 6
    assert (curve(tmp_path), shards(s3.address())) == on_files
    assert all(fault.count > fault.every for fault in s3.proxy.faults), [f.count for f in s3.proxy.faults]


@pytest.mark.slow
def test_a_server_that_refuses_for_long_costs_one_checkpoint(tmp_path: Path, s3: Bucket, on_files, monkeypatch, caplog):
    monkeypatch.setattr(connection, "REQUEST_ATTEMPTS", 2)
    connection._driver.cache_clear()
    s3.inject(Fault("PUT", "iter_0000004/", status=503, times=4))
    assert pretrain(config(tmp_path, s3.address())).exit_code == 0
    connection._driver.cache_clear()
    assert "iteration 4 was not saved" in caplog.text
    assert "injected ServiceUnavailable" in caplog.text
    curve_there, shards_there = curve(tmp_path), shards(s3.address())
    assert curve_there == on_files[0]
    assert shards_there == {iteration: on_files[1][iteration] for iteration in (2, 6)}


@pytest.mark.slow
def test_a_last_checkpoint_without_space_ends_as_on_files(tmp_path: Path, s3: Bucket, monkeypatch):
    monkeypatch.setattr(loop, "RETRY_S", (0.01, 0.02))
    s3.inject(Fault("PUT", "iter_0000006/__0_0", status=507, code="InsufficientStorage"))
    with pytest.raises(NotSavedError, match="the newest checkpoint is iteration 4"):
        pretrain(config(tmp_path, s3.address()))
    assert set(shards(s3.address())) == {2, 4}


def start(cfg, folder: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    file = folder / "run.yaml"
    file.write_text(cfg.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", "--config", str(file)]
    command += ["--nproc", str(processes)] if processes > 1 else []
    with (folder / "log.txt").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("part", ["__0_0.distcp", "config.yaml", "manifest.json"])
def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path: Path, s3: Bucket, on_files, part: str, is_async: bool):
    """The request is on its way when the process dies, and its object may appear later."""
    held = s3.inject(Fault("PUT", f"iter_0000004/{part}", hold=threading.Event(), times=1))
    cfg = config(tmp_path, s3.address(), async_save=is_async)
    process = start(cfg, tmp_path)
    assert held.met.wait(300), (tmp_path / "log.txt").read_text()[-3000:]
    end(process)
    assert (RunDirectory(s3.address()).iterations()) == [2]
    held.hold.set()
    if part == "manifest.json":  # it arrives: the checkpoint is whole all the same
        while not (s3.place() / "iter_0000004" / part).exists():
            time.sleep(0.05)
    assert start(cfg, tmp_path).wait(300) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert (curve(tmp_path), shards(s3.address())) == on_files
    text = (tmp_path / "log.txt").read_text()
    resumed = 4 if part == "manifest.json" else 2
    assert f"resumed from {s3.address()}/iter_{resumed:07d}" in text
    assert ("the remains of a save that did not finish" in text) == (resumed == 2)
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_at_random_is_the_run_on_files(tmp_path_factory, s3: Bucket, processes: int):
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    files = config(whole, str(whole / "run"))
    assert start(files, whole, processes).wait(300) == 0, (whole / "log.txt").read_text()[-3000:]
    rng, cfg = random.Random(11 + processes), config(folder, s3.address(), async_save=True, save_interval=1)
    kills = 0
    for _ in range(4):
        before = len(RunDirectory(s3.address()).iterations())
        process = start(cfg, folder, processes)
        while process.poll() is None and len(RunDirectory(s3.address()).iterations()) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            kills += 1
            end(process)
    assert start(cfg, folder, processes).wait(300) == 0, (folder / "log.txt").read_text()[-3000:]
    assert kills >= 2
    assert curve(folder) == curve(whole)
    there, here = shards(s3.address()), shards(str(whole / "run"))
    assert {iteration: there[iteration] for iteration in here} == here


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, s3: Bucket):
    cfg = config(tmp_path, s3.address())
    cfg.logger.log_dir = None
    with pytest.raises(ConfigError, match=r"logger\.log_dir = None: must name a folder: metrics and logs are files"):
        pretrain(cfg)
    cfg = config(tmp_path, "s3://no-such-bucket-here/run")
    with pytest.raises(CheckpointError, match=r"cannot be listed \(there is no bucket 'no-such-bucket-here'\)"):
        pretrain(cfg)
    cfg = config(tmp_path, s3.address())
    cfg.checkpoint.load = s3.address("other")
    with pytest.raises(CheckpointError, match="there is no such directory, so it holds no checkpoint"):
        pretrain(cfg)
    s3.inject(Fault("PUT", "/run/", status=403, code="AccessDenied"))
    with pytest.raises(CheckpointError, match=r"cannot be written \(permission denied: injected AccessDenied\)"):
        pretrain(config(tmp_path, s3.address()))
    assert not place(s3.address()).exists()
