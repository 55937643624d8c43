import multiprocessing
import os
import time

import numpy as np
import pytest

from megatron_mtp.data.files import cached_array, replacing, write_atomically

pytestmark = pytest.mark.unit


def _build_slowly(path, log):
    def build():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return np.arange(5)

    cached_array(path, build)
    assert np.load(path).tolist() == [0, 1, 2, 3, 4]


def _hold_lock_and_die(path):
    cached_array(path, lambda: os._exit(3))


def test_one_process_builds_and_the_others_wait_for_the_file(tmp_path):
    context = multiprocessing.get_context("fork")
    path, log = tmp_path / "deep" / "index.npy", tmp_path / "log"
    processes = [context.Process(target=_build_slowly, args=(path, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 1
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_a_builder_that_dies_is_replaced(tmp_path):
    path = tmp_path / "index.npy"
    process = multiprocessing.get_context("fork").Process(target=_hold_lock_and_die, args=(path,))
    process.start()
    process.join(20)
    assert process.exitcode == 3
    cached_array(path, lambda: np.arange(2))
    assert np.load(path).tolist() == [0, 1]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
