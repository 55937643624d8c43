"""A save that fails, wherever it fails, is reported on every rank, harms nothing, and the next one works."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mtp.checkpoint import checkpointer, directory, writer
from megatron_mtp.errors import CheckpointError
from tests.checkpoint.rig import DENSE, Rig, differences, make_config, resumed, rig

pytestmark = pytest.mark.dist

ASYNC = {**DENSE, "checkpoint.async_save": True}


@contextmanager
def full_disk(place: str):
    """The disk is full for one rank, at one place of a save."""
    patched = {
        "file of rank 1": (1, writer.os, "fsync"),
        "metadata on rank 0": (0, writer, "write_durably"),
        "config on rank 0": (0, checkpointer, "write_durably"),
        "manifest on rank 0": (0, directory, "write_durably"),
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


def save_on_a_full_disk(values: dict, path: str, place: str) -> tuple:
    with rig(make_config(values, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        run.checkpointer.maybe_finalize(blocking=True)
        run.steps(1)
        with full_disk(place):
            message = try_to_save(run)
        dist.barrier()
        left = sorted(os.listdir(path))
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
        return sorted(name for name in os.listdir(path) if name.startswith("iter_"))


def test_retention(ranks, tmp_path):
    assert ranks(2).run(retain, str(tmp_path))[0] == ["iter_0000003", "iter_0000004"]


def leave_remains(path: str) -> list[str]:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
    if dist.get_rank() == 0:
        shutil.copytree(f"{path}/iter_0000001", f"{path}/iter_0000002.partial")
    dist.barrier()
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        assert run.resume()
        assert run.state.iteration == 1
        return sorted(name for name in os.listdir(path) if name.startswith("iter_"))


def test_what_a_dead_process_left_is_cleared_at_the_start(ranks, tmp_path):
    assert ranks(2).run(leave_remains, str(tmp_path))[0] == ["iter_0000001"]
