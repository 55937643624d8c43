"""One process at a time holds a lock; one that is gone loses it, one that lives does not."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mtp.data import lock as lock_module
from megatron_mtp.data.lock import BEAT_S, POLL_S, SILENT_S, UNKNOWN, Lock, Owner
from megatron_mtp.errors import InUseError

pytestmark = pytest.mark.unit


def new(folder: Path) -> Lock:
    return Lock(folder / "run.lock", f"checkpoint.save = {folder}")


def take(lock: Lock, patience_s: float = 0.0, leaving_patience_s: float = 0.0) -> int:
    """Takes it, and returns how many looks found it in use."""
    return sum(1 for _ in lock.take(patience_s, leaving_patience_s))


def owner(**values: object) -> Owner:
    """Another process of this machine that lives as long as the test: the parent of this one."""
    started = lock_module._start_time(os.getppid())
    return replace(Owner.this_process(), token="f00d", pid=os.getppid(), started=started, **values)


def put(folder: Path, held_by: Owner) -> Path:
    path = folder / "run.lock"
    path.write_text(json.dumps(asdict(held_by)))
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only while someone sleeps; `during` is called with each sleep."""
    clock = SimpleNamespace(now=1000.0, during=lambda: None)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.during()

    monkeypatch.setattr(lock_module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def test_it_names_its_owner_and_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock = new(tmp_path)
    assert take(lock) == 0
    found = json.loads(lock.path.read_text())
    assert (found["pid"], found["job"], found["is_leaving"]) == (os.getpid(), "Slurm job 4711", False)
    assert {"host", "machine", "started", "launched"} <= {name for name, value in found.items() if value}
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    again = new(tmp_path)
    assert take(again) == 0
    again.release()


def test_a_live_owner_is_not_disturbed_and_a_killed_one_is_followed_at_once(tmp_path: Path):
    code = f"""
import time
from pathlib import Path
from megatron_mtp.data.lock import Lock
list(Lock(Path({str(tmp_path / "run.lock")!r}), "it").take(0))
print(flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    before = (tmp_path / "run.lock").read_bytes()
    with pytest.raises(InUseError, match=rf"checkpoint\.save = .*: is in use by process {process.pid} on .*stop it"):
        take(new(tmp_path))
    assert (tmp_path / "run.lock").read_bytes() == before
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not asked for it
    lock = new(tmp_path)
    assert take(lock) == 0
    process.wait()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_the_owner_is_not_the_owner(tmp_path: Path):
    put(tmp_path, owner())
    with pytest.raises(InUseError):
        take(new(tmp_path))
    put(tmp_path, replace(owner(), started="1"))
    lock = new(tmp_path)
    assert take(lock) == 0
    lock.release()


@pytest.mark.parametrize("held_by", ["an owner elsewhere", "a file that was cut off"])
def test_an_owner_that_cannot_be_seen_is_judged_by_its_heartbeat(tmp_path: Path, clock, held_by: str):
    path = put(tmp_path, owner(machine="another boot"))
    if held_by != "an owner elsewhere":
        path.write_text("{")
    began, lock = clock.now, new(tmp_path)
    take(lock, patience_s=0.0, leaving_patience_s=0.0)
    assert SILENT_S <= clock.now - began <= SILENT_S + 2 * POLL_S
    lock.release()

    path = put(tmp_path, owner(machine="another boot"))
    clock.during = lambda: os.utime(path, ns=(0, int(clock.now // BEAT_S)))
    began = clock.now
    with pytest.raises(InUseError):
        take(new(tmp_path), patience_s=5 * SILENT_S)
    assert clock.now - began >= 5 * SILENT_S


def test_time_in_which_the_file_system_stood_still_is_no_silence(tmp_path: Path, clock):
    """The machine of the lock stands still for an hour, for both sides; then the heartbeat goes on."""
    path = put(tmp_path, owner(machine="another boot"))

    def stall() -> None:
        if clock.now < 1000 + 30:
            clock.now += 3600
        else:
            os.utime(path, ns=(0, int(clock.now * 1e9)))

    clock.during = stall
    with pytest.raises(InUseError):
        take(new(tmp_path))
    assert Lock(path, "")._storage.read()[0].machine == "another boot"


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path: Path, clock):
    put(tmp_path, owner(is_leaving=True))
    began = clock.now
    with pytest.raises(InUseError):
        take(new(tmp_path), 5.0, 300.0)
    assert clock.now - began == pytest.approx(300, abs=1)
    path, began = put(tmp_path, owner(is_leaving=True)), clock.now
    clock.during = lambda: clock.now - began > 200 and path.unlink(missing_ok=True)
    lock = new(tmp_path)
    assert take(lock, 5.0, 300.0) > 0
    assert 200 <= clock.now - began <= 202
    lock.announce_end()
    assert json.loads(path.read_text()) == asdict(replace(lock.owner, is_leaving=True))
    lock.release()


def compete(folder: Path, has_flock: bool, start, end, results) -> None:
    if not has_flock:
        lock_module.fcntl.flock = lambda descriptor, how: os.read(-1, 1)  # an OSError
        lock_module.SETTLE_S = 1.0
    lock = new(folder)
    start.wait()
    try:
        take(lock)
        results.put(os.getpid())
    except InUseError:
        results.put(None)
    end.wait()


@pytest.mark.parametrize("has_flock", [True, False])
def test_one_of_many_takes_over(tmp_path: Path, has_flock: bool):
    context = multiprocessing.get_context("fork")
    for attempt in range(3 if has_flock else 1):
        (folder := tmp_path / str(attempt)).mkdir()
        put(folder, replace(owner(), started="gone"))
        start, end, results = context.Barrier(6), context.Barrier(6), context.Queue()
        processes = [context.Process(target=compete, args=(folder, has_flock, start, end, results)) for _ in range(6)]
        for process in processes:
            process.start()
        won = [pid for pid in (results.get(timeout=60) for _ in processes) if pid]
        for process in processes:
            process.join(60)
        assert len(won) == 1
        assert new(folder)._storage.read()[0].pid == won[0]
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_one_that_lost_the_lock_hears_of_it_and_leaves_it_alone(tmp_path: Path):
    lock = new(tmp_path)
    take(lock)
    lock.path.unlink()
    lock.check()
    assert lock._storage.read()[0] == lock.owner, "one that somebody deleted is made again"
    put(tmp_path, other := owner(machine="another boot"))
    with pytest.raises(InUseError, match="took over from this process"):
        lock.check()
    lock.announce_end()
    lock.release()
    assert lock._storage.read()[0] == other


def test_the_heartbeat_ends_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    lock = new(tmp_path)
    take(lock)
    os.utime(lock.path, ns=(0, 0))
    deadline = time.monotonic() + 20
    while lock.path.stat().st_mtime_ns == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    put(tmp_path, owner())
    os.utime(lock.path, ns=(0, 0))
    lock._thread.join(20)
    assert not lock._thread.is_alive()
    assert lock.path.stat().st_mtime_ns == 0, "another's lock gets no heartbeat"
    assert lock._storage.read()[0] != UNKNOWN
    lock.release()
