"""A save that fails, wherever it fails, is reported on every rank, harms nothing, and the next one works."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.checkpoint import checkpointer, completion, directory, writer
from megatron_mtp.data.lock import Owner, _start_time
from megatron_mtp.errors import CheckpointError, InUseError
from megatron_mtp.storage.place import place, write_durably
from tests.checkpoint.conftest import lead_ranks_to
from tests.checkpoint.rig import DENSE, Rig, differences, make_config, resumed, rig
from tests.harness.s3 import Fault

pytestmark = pytest.mark.dist

ASYNC = {**DENSE, "checkpoint.async_save": True}


@contextmanager
def full_disk(place: str):
    """The disk is full for one rank, at one place of a save."""
    patched = {
        "file of rank 1": (1, writer.os, "fsync"),
        "config on rank 0": (0, writer, "write_durably"),
        "metadata on rank 0": (0, writer, "write_metadata"),
        "manifest on rank 0": (0, completion, "write_durably"),
        "folder on rank 0": (0, directory.RunDirectory, "begin"),
    }
    rank, owner, name = patched[place]
    if dist.get_rank() != rank:
        yield
        return

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = getattr(owner, name)
    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, original)


def try_to_save(run: Rig) -> str:
    """The message of a save that must fail, wherever it is raised."""

    def save() -> None:
        run.save()
        run.checkpointer.maybe_finalize(blocking=True)

    with pytest.raises(CheckpointError) as caught:
        save()
    return str(caught.value)


def contents(path: str) -> list[str]:
    """Names in a run directory that a run holds."""
    names = (one.name for one in place(path).iterdir())
    return sorted(name for name in names if not name.startswith(checkpointer.LOCK_NAME))


def save_on_a_full_disk(values: dict, path: str, where: str | None) -> tuple:
    with rig(make_config(values, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        run.checkpointer.maybe_finalize(blocking=True)
        run.steps(1)
        with full_disk(where) if where else contextlib.nullcontext():
            message = try_to_save(run)
        dist.barrier()
        left = contents(path)
        last = run.checkpointer.last_saved
        run.steps(1)
        run.save()
        run.checkpointer.maybe_finalize(blocking=True)
        return message, left, last, run.weights()


PLACES = ["file of rank 1", "metadata on rank 0", "config on rank 0", "manifest on rank 0", "folder on rank 0"]
FAST = {("file of rank 1", "async"), ("metadata on rank 0", "sync"), ("folder on rank 0", "sync")}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        pytest.param(values, place, marks=() if (place, how) in FAST else pytest.mark.slow, id=f"{place}-{how}")
        for place in PLACES
        for how, values in (("sync", DENSE), ("async", ASYNC))
    ],
)
def test_a_full_disk_is_reported_and_survived(ranks, tmp_path, values, place):
    outcomes = ranks(2).run(save_on_a_full_disk, values, str(tmp_path), place)
    for message, left, last, _ in outcomes:
        assert "iteration 2 was not saved" in message
        assert "No space left on device" in message
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        # A save that did not begin leaves the older one the last; one that broke off may be tried again.
        assert last == (1 if place == "folder on rank 0" else None)
    start, weights = ranks(2).run(resumed, values, 3, str(tmp_path))[0]
    assert start == 3
    assert differences(outcomes[0][3], weights) == {}


REFUSED = {"file of rank 1": "__1_0", "metadata": ".metadata", "config": "config.yaml", "manifest": "manifest.json"}


@pytest.mark.parametrize(
    ("values", "where"),
    [
        pytest.param(
            values, where, marks=() if (where, how) == ("manifest", "async") else pytest.mark.slow, id=f"{where}-{how}"
        )
        for where in REFUSED
        for how, values in (("sync", DENSE), ("async", ASYNC))
    ],
)
def test_object_storage_without_space_is_reported_and_survived(ranks, s3, values, where):
    lead_ranks_to(ranks, s3.proxy.url)
    path = s3.address()
    s3.inject(Fault("PUT", f"iter_0000002/{REFUSED[where]}", status=507, code="InsufficientStorage"))
    outcomes = ranks(2).run(save_on_a_full_disk, values, path, None)
    for message, left, last, _ in outcomes:
        assert "iteration 2 was not saved" in message
        assert "injected InsufficientStorage" in message
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        assert last is None
    start, weights = ranks(2).run(resumed, values, 3, path)[0]
    assert start == 3
    assert differences(outcomes[0][3], weights) == {}


def save_into_a_vanished_directory(path: str) -> tuple:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        dist.barrier()
        if dist.get_rank() == 0:
            os.rename(path, path + ".away")
        dist.barrier()
        message = try_to_save(run)
        came_back = os.path.exists(path)
        dist.barrier()
        if dist.get_rank() == 0:
            os.rename(path + ".away", path)
        dist.barrier()
        run.steps(1)
        run.save()
        return message, came_back, sorted(os.listdir(path))


def test_a_vanished_directory_is_reported_and_not_made_anew(ranks, tmp_path):
    for message, came_back, names in ranks(2).run(save_into_a_vanished_directory, str(tmp_path / "run")):
        assert "No such file or directory" in message
        assert not came_back
        assert names[:2] == ["iter_0000001", "iter_0000002"]


def save_where_the_folder_vanishes(path: str) -> tuple:
    """Someone removes the folder of the checkpoint after it was made, before the ranks plan what they write."""
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        begin = directory.RunDirectory.begin
        directory.RunDirectory.begin = lambda self, iteration: shutil.rmtree(begin(self, iteration))
        try:
            message = try_to_save(run)
        finally:
            directory.RunDirectory.begin = begin
        run.save()
        return message, contents(path)


def test_a_folder_that_vanishes_during_a_save_is_reported_on_every_rank(ranks, tmp_path):
    for message, left in ranks(2).run(save_where_the_folder_vanishes, str(tmp_path)):
        assert "iteration 1 was not saved" in message
        assert "No such file or directory" in message
        assert left == ["iter_0000001", directory.LATEST_NAME]


def save_beside_another(path: str) -> tuple:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        if dist.get_rank() == 0:
            os.makedirs(f"{path}/iter_0000001")
        dist.barrier()
        message = try_to_save(run)
        dist.barrier()
        if dist.get_rank() == 0:
            Path(path, checkpointer.LOCK_NAME).write_text("{}")
        dist.barrier()
        with pytest.raises(InUseError) as caught:
            run.save()
        run.checkpointer.release()
        return message, str(caught.value), sorted(os.listdir(path))


def test_nothing_of_another_run_is_replaced(ranks, tmp_path):
    """Neither a checkpoint that this run has not skipped, nor anything once another has the lock."""
    for replacing, lost, left in ranks(2).run(save_beside_another, str(tmp_path)):
        assert "iter_0000001: exists already, and this run did not write it" in replacing
        assert "took over from this process" in lost
        assert left == ["iter_0000001", checkpointer.LOCK_NAME]


def start_beside_another(path: str, other: Owner) -> tuple:
    lock, partial = Path(path, checkpointer.LOCK_NAME), Path(path, "iter_0000002.partial")
    if dist.get_rank() == 0:
        lock.write_text(json.dumps(asdict(other)))
        partial.mkdir()
    dist.barrier()
    cfg = make_config({**DENSE, "checkpoint.lock_wait_s": 0.5}, dist.get_world_size(), path)
    try:
        with rig(cfg) as run:
            run.steps(1)
            run.save()
            return "", contents(path)
    except InUseError as error:
        return str(error), lock.read_text(), sorted(os.listdir(path))


@pytest.mark.parametrize("is_alive", [True, False])
def test_all_ranks_are_refused_beside_a_run_or_follow_one_that_is_gone(ranks, tmp_path, is_alive):
    started = _start_time(os.getpid()) if is_alive else "long ago"
    other = replace(Owner.this_process(), started=started)
    outcomes = ranks(2).run(start_beside_another, str(tmp_path), other)
    if is_alive:
        for message, lock, left in outcomes:
            assert f"is in use by process {os.getpid()} on" in message
            assert json.loads(lock) == asdict(other)
            assert left == ["iter_0000002.partial", checkpointer.LOCK_NAME], "what the other run writes stays"
    else:
        for message, left in outcomes:
            assert (message, left[0]) == ("", "iter_0000001")


@pytest.mark.parametrize("room", [700, 3000, 50_000])
@pytest.mark.parametrize("length", [100, 5000, 100_000])
def test_the_disk_is_named_whatever_torch_makes_of_its_refusal(tmp_path, length, room):
    """The largest size of a file stands for a full disk: a system call that refuses in the middle of a tensor."""
    file = writer.RankFile([(SimpleNamespace(index=i), torch.ones(length)) for i in range(200)], None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        written = writer.write(file, tmp_path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert written.error == f"rank 0, {tmp_path}/__0_0.distcp: File too large"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, writable or not at wish."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_up_and_go_on(path: str, how: str) -> tuple:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        spoil(path, how)
        run.steps(1)
        message = try_to_save(run)
        dist.barrier()
        left = sorted(os.listdir(path))
        mend(path, how)
        run.steps(1)
        run.save()
        return message, left, sorted(os.listdir(path))


def spoil(path: str, how: str) -> None:
    if dist.get_rank() == 0:
        if how == "full":
            with open(Path(path).parent / "ballast", "wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(b"x" * 4096)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(Path(path).parent)], check=True)
    dist.barrier()


def mend(path: str, how: str) -> None:
    if dist.get_rank() == 0:
        if how == "full":
            (Path(path).parent / "ballast").unlink()
        else:
            subprocess.run(["mount", "-o", "remount,rw", str(Path(path).parent)], check=True)
    dist.barrier()


@pytest.mark.parametrize(("how", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_real_disk_that_refuses(ranks, small_disk, how, reason):
    for message, left, names in ranks(2).run(fill_up_and_go_on, str(small_disk / "run"), how):
        assert reason in message
        assert "iter_0000001" in left
        assert not any(name.endswith(".partial") for name in left)
        assert {"iter_0000001", "iter_0000003"} <= set(names)


def retain(path: str) -> list[str]:
    with rig(make_config({**DENSE, "checkpoint.most_recent_k": 2}, dist.get_world_size(), path)) as run:
        for _ in range(4):
            run.steps(1)
            run.save()
        run.checkpointer.close()
        return contents(path)[:-1]


def test_retention(ranks, run_folder):
    assert ranks(2).run(retain, str(run_folder))[0] == ["iter_0000003", "iter_0000004"]


def leave_remains(path: str) -> list[str]:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
    if dist.get_rank() == 0:
        run_folder = directory.RunDirectory(path)
        write_durably(run_folder.begin(2) / "__0_0.distcp", b"half")
    dist.barrier()
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        assert run.resume()
        assert run.state.iteration == 1
        return contents(path)


def test_what_a_dead_process_left_is_cleared_at_the_start(ranks, run_folder):
    assert ranks(2).run(leave_remains, str(run_folder))[0] == ["iter_0000001", directory.LATEST_NAME]
