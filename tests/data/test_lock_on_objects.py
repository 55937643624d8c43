"""The lock of a run directory on an S3 server: one process at a time, whatever requests and processes go through."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from megatron_mtp.data import lock as lock_module
from megatron_mtp.data.lock import Lock, Owner
from megatron_mtp.errors import InUseError
from megatron_mtp.storage.remote_path import RemotePath
from tests.data.test_lock import owner, take
from tests.harness.s3 import Bucket, Fault

pytestmark = pytest.mark.unit


@pytest.fixture
def path(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(lock_module, "POLL_S", 0.02)
    return s3.place() / "run.lock"


def new(path: RemotePath) -> Lock:
    return Lock(path, f"checkpoint.save = {path.parent}")


def put(path: RemotePath, held_by: Owner) -> None:
    path.write_bytes(json.dumps(asdict(held_by)).encode())


def test_it_names_its_owner_and_is_given_back(path: RemotePath):
    lock = new(path)
    assert take(lock) == 0
    assert json.loads(path.read_bytes())["token"] == lock.owner.token
    lock.check()
    put(path, owner())
    with pytest.raises(InUseError, match="is in use by process"):
        take(new(path))
    put(path, lock.owner)
    lock.announce_end()
    assert json.loads(path.read_bytes())["is_leaving"]
    lock.release()
    assert not path.parent.exists(), "nothing is left, no heartbeat either"


def test_of_many_one_makes_it(path: RemotePath):
    locks = [new(path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda lock: lock._storage.create(lock.owner), locks))
    assert made.count(True) == 1
    assert locks[made.index(True)].owner.token == json.loads(path.read_bytes())["token"]


def test_an_answer_that_is_lost_loses_no_lock(s3: Bucket, path: RemotePath):
    """The server has made the object; the repeated request finds it."""
    fault = s3.inject(Fault("PUT", "run.lock", cut_at=0, times=1, is_cut_early=True))
    lock = new(path)
    assert take(lock) == 0
    assert fault.count == 1
    lock.check()
    lock.release()


def test_a_killed_owner_is_followed_at_once(path: RemotePath):
    code = f"""
import time
from megatron_mtp.data.lock import Lock
from megatron_mtp.storage.remote_path import RemotePath
list(Lock(RemotePath({str(path)!r}), "it").take(0))
print(flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InUseError, match=rf"is in use by process {process.pid} on"):
        take(new(path))
    process.kill()
    process.wait()
    lock = new(path)
    assert take(lock) == 0
    lock.release()
    assert not path.parent.exists(), "the heartbeat of the one that is gone is removed too"


def test_an_owner_elsewhere_is_judged_by_its_heartbeat(path: RemotePath, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock_module, "SILENT_S", 0.3)
    other = owner(machine="another boot")
    put(path, other)
    lock = new(path)
    looks = take(lock)
    assert looks > 1
    assert lock.silent_s >= 0.3
    lock.release()


def test_an_owner_that_wakes_up_does_not_disturb_the_next_one(path: RemotePath, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    frozen = new(path)
    assert take(frozen) == 0
    next_one = replace(owner(), machine="another boot")
    put(path, next_one)
    frozen._thread.join(20)
    assert not frozen._thread.is_alive()
    with pytest.raises(InUseError, match="took over from this process"):
        frozen.check()
    frozen.release()
    time.sleep(0.05)
    assert json.loads(path.read_bytes()) == asdict(next_one)
