"""The cache of blocks: never above its limit, the oldest go first, and a block is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mtp.data import block_cache
from megatron_mtp.data.block_cache import Block, BlockCache
from megatron_mtp.errors import DataError

pytestmark = pytest.mark.unit
SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


def blocks(folder: Path) -> list[Path]:
    return [path for path in (folder / "blocks").rglob("*") if path.is_file()]


def fill(cache: BlockCache, numbers) -> None:
    for number in numbers:
        cache.write(Block("x", number, SIZE), content(number))


def held(cache: BlockCache, count: int) -> list[int]:
    return [number for number in range(count) if cache.holds(Block("x", number, SIZE))]


def age(cache: BlockCache, number: int, seconds: float) -> None:
    path = cache.folder / "blocks" / "x" / f"{number:08x}"
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_what_was_written_is_read_at_any_place(tmp_path: Path):
    cache = BlockCache(tmp_path, 10 * SIZE)
    cache.write(Block("x", 3, SIZE), bytes(range(250)) * 4)
    assert cache.read(Block("x", 3, SIZE), 255, 4) == bytes([5, 6, 7, 8])
    assert cache.read(Block("x", 4, SIZE), 0, 4) is None
    assert cache.read(Block("y", 3, SIZE), 0, 4) is None
    assert BlockCache(tmp_path, 10 * SIZE).read(Block("x", 3, SIZE), 0, 2) == b"\0\1"


def test_the_blocks_that_were_used_longest_ago_are_deleted(tmp_path: Path):
    cache = BlockCache(tmp_path, 10 * SIZE)
    fill(cache, range(10))
    for number in range(10):
        age(cache, number, 100 - number)
    assert cache.read(Block("x", 0, SIZE), 0, SIZE) == content(0)  # used now, so 1 is the oldest
    fill(cache, [10])
    assert held(cache, 11) == [0, *range(3, 11)]  # down to nine tenths of the limit, the new one among them
    fill(cache, range(11, 200))
    assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 10 * SIZE
    assert held(cache, 200)[-1] == 199


def test_a_lower_limit_holds_from_the_start(tmp_path: Path):
    fill(BlockCache(tmp_path, 10 * SIZE), range(10))
    BlockCache(tmp_path, 4 * SIZE)
    assert len(blocks(tmp_path)) == 4


WRITER = """
import sys
from pathlib import Path
from megatron_mtp.data.block_cache import Block, BlockCache
cache = BlockCache(Path(sys.argv[1]), 20_000)
for turn in range(300):
    block = Block("x", (turn * 7 + int(sys.argv[2])) % 60, 1000)
    found = cache.read(block, 0, 1000)
    if found is None:
        cache.write(block, bytes([block.number]) * 1000)
    elif found != bytes([block.number]) * 1000:
        sys.exit("a block holds another one's bytes")
    with cache._sum():  # no block comes or goes
        used = sum(path.stat().st_size for path in (cache.folder / "blocks" / "x").glob("0*"))
    if used > 20_000:
        sys.exit(f"{used} bytes")
"""


def test_processes_share_it_within_its_limit(tmp_path: Path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(3)]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    assert not [path for path in blocks(tmp_path) if path.name.startswith(".")]


def test_one_process_waits_while_another_has_the_turn(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from megatron_mtp.data.block_cache import Block, BlockCache\n"
        "with BlockCache(Path(sys.argv[1]), 10_000).turn(Block('x', 1, 10)): print('mine')\n"
    )
    with BlockCache(tmp_path, 10_000).turn(Block("x", 1, 10)):
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    assert other.communicate(timeout=30)[0] == b"mine\n"


@pytest.mark.parametrize("damage", [b"short", content(1) + b"more"])
def test_a_damaged_block_is_not_used(tmp_path: Path, caplog, damage: bytes):
    cache = BlockCache(tmp_path, 10 * SIZE)
    fill(cache, [1])
    blocks(tmp_path)[0].write_bytes(damage)
    assert cache.read(Block("x", 1, SIZE), 0, 4) is None
    assert "is damaged" in caplog.text
    assert blocks(tmp_path) == []


def full_disk(monkeypatch, cache: BlockCache, most: int) -> None:
    """From now on the disk takes no more than `most` bytes of blocks."""

    def fsync(_: int) -> None:
        if sum(path.stat().st_size for path in blocks(cache.folder)) > most:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache.os, "fsync", fsync)
    room = SimpleNamespace(free=0)
    monkeypatch.setattr(block_cache.shutil, "disk_usage", lambda _: room)


def test_a_full_disk_makes_it_smaller_and_says_so(tmp_path: Path, monkeypatch, caplog):
    cache = BlockCache(tmp_path, 1000 * SIZE)
    full_disk(monkeypatch, cache, 40 * SIZE)
    fill(cache, range(200))
    assert 16 * SIZE <= cache.limit < 40 * SIZE
    assert "No space left on device" in caplog.text
    assert "dataset.object_storage_cache_gib" in caplog.text
    assert len(caplog.records) < 5
    assert held(cache, 200)[-1] == 199


def test_one_of_many_threads_makes_it_smaller(tmp_path: Path, monkeypatch):
    cache = BlockCache(tmp_path, 1000 * SIZE)
    fill(cache, range(100))
    all_write = threading.Barrier(8)

    def fsync(_: int) -> None:
        all_write.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache.os, "fsync", fsync)
    monkeypatch.setattr(block_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: fill(cache, [number]), range(100, 108)))
    assert cache.limit == 90 * SIZE


def test_a_full_disk_without_room_for_a_few_blocks_is_an_error(tmp_path: Path, monkeypatch):
    cache = BlockCache(tmp_path, 1000 * SIZE)
    full_disk(monkeypatch, cache, 5 * SIZE)
    with pytest.raises(DataError, match=r"object_storage_cache_path = .*No space left on device, and the cache holds"):
        fill(cache, range(200))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"object_storage_cache_path = .*cannot be written"):
        BlockCache(tmp_path / "file" / "cache", 10)


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path):
    cache = BlockCache(tmp_path / "cache", 10 * SIZE)
    fill(cache, [1])
    shutil.rmtree(tmp_path / "cache")
    assert cache.read(Block("x", 1, SIZE), 0, 4) is None
    fill(cache, [1])
    assert held(cache, 2) == [1]
