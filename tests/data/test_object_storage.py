"""Data in object storage: the batches of files, through faults of the server, and nothing of a replaced object."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data import object_file
from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.fim import FillInTheMiddle
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.object_file import ObjectCache
from megatron_mtp.data.sources import check_data, data_fingerprints
from megatron_mtp.errors import ConfigError, DataError
from megatron_mtp.storage import connection
from megatron_mtp.storage.remote_path import RemotePath
from tests.data.corpora import hash_samples, write_corpus
from tests.harness.s3 import Bucket, Fault

pytestmark = pytest.mark.unit
NAMES = ("a", "b")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A data set of a few KB has several blocks."""
    monkeypatch.setattr(object_file, "TOKEN_BLOCK", 2048)
    monkeypatch.setattr(object_file, "INDEX_BLOCK", 1024)
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)


@pytest.fixture
def few_attempts(monkeypatch):
    """Must come before the bucket, whose driver keeps the number."""
    monkeypatch.setattr(connection, "REQUEST_ATTEMPTS", 2)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two data sets with masks; one is larger than a few blocks."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        lengths = [10, 90, 33, 1, 57] * (30 if number else 60)
        write_corpus(folder / name, lengths, vocab_size=256, eod=256, seed=number)
        writer = IndexedWriter(f"{folder / name}_mask", np.dtype(np.uint8))
        for length in lengths:
            writer.write(np.arange(length) % 3 != number, np.array([length]))
        writer.close()
    return folder


def upload(files: Path, address: str) -> str:
    for path in files.iterdir():
        if path.is_file():
            (RemotePath(address) / path.name).write_bytes(path.read_bytes())
    return address


@pytest.fixture(params=["memory", "s3"])
def address(request, files: Path, tmp_path: Path) -> str:
    if request.param == "s3":
        return upload(files, request.getfixturevalue("s3").address("corpus/v1"))
    return upload(files, f"memory://{tmp_path.name}/corpus")


@pytest.fixture
def on_s3(s3: Bucket, files: Path) -> str:
    return upload(files, s3.address("corpus"))


def config(where: str | Path, cache: Path, **dataset) -> ConfigContainer:
    cfg = ConfigContainer()
    cfg.model.update(vocab_size=257, seq_length=32)
    cfg.train.update(micro_batch_size=1, global_batch_size=8)
    cfg.validation.eval_iters = 2
    cfg.tokenizer.tokenizer_type = "bytes"
    values = {
        "blend": [[f"{where}/{name}" for name in NAMES], [0.3, 0.7]],
        "split": "8,2,0",
        "valid_sets": {"docs": [f"{where}/a"]},
        "object_storage_cache_path": str(cache),
        "object_storage_cache_gib": 0.0625,
    }
    cfg.dataset.update(**(values | dataset))
    return cfg


def digests(cfg: ConfigContainer, consumed: int = 0, steps: int = 30) -> list:
    """What the run reads: training batches from `consumed` samples on, and each validation set."""
    data = build_data(cfg, DataPlacement(), num_depths=2)
    try:
        streams = [itertools.islice(data.train(consumed), steps), *(data.valid(name) for name in data.valid_names)]
        return [[(hash_samples(batch), batch.num_targets.tolist()) for batch in stream] for stream in streams]
    finally:
        data.close()


CASES = {
    "plain": {},
    "masks": {"loss_mask_suffix": "_mask", "reset_attention_mask": True},
    "not prefetched": {"prefetch_steps": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_batches_are_those_of_files(case: str, address: str, files: Path, tmp_path: Path):
    local = digests(config(files, tmp_path / "unused", **CASES[case]))
    assert digests(config(address, tmp_path / "cache", **CASES[case])) == local
    assert digests(config(address, tmp_path / "cache", **CASES[case]), 64, 22)[0] == local[0][8:]
    assert not (tmp_path / "unused").exists()


def test_a_cache_that_is_smaller_than_the_data_gives_the_same(on_s3: str, files: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("megatron_mtp.data.sources.GIB", 2**18)  # 0.0625 of it are 16 KiB
    cfg = config(on_s3, tmp_path / "cache", valid_sets=None, blend=[f"{on_s3}/a"])
    local = digests(config(files, tmp_path, valid_sets=None, blend=[f"{files}/a"]), steps=8)
    assert digests(cfg, steps=8) == local
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").rglob("0*")) <= 2**14
    assert sum(path.stat().st_size for path in files.glob("a.*")) > 2**14


def test_documents_are_rearranged_as_those_of_files(address: str, files: Path, tmp_path: Path):
    fim = FillInTheMiddle(rate=0.5, spm_rate=0.5, sentinels=(257, 258, 259), eod=256, seed=3, name="a")
    cache = ObjectCache(tmp_path / "cache", 1 << 26)
    readers = IndexedReader(f"{files}/a"), IndexedReader(f"{address}/a", cache)
    local, there = (Corpus(reader, (0, 300), "train", 32, 256, 3, fim=fim) for reader in readers)
    for corpus in (local, there):
        corpus.build_index(None)
    for sample in range(local.num_samples):
        there.will_read(sample)
        assert there.read(sample).tokens.tolist() == local.read(sample).tokens.tolist()
    cache.close()


def test_fingerprints_are_those_of_files(address: str, files: Path, tmp_path: Path):
    """So that a run whose data moved to object storage resumes."""
    there = data_fingerprints(config(address, tmp_path / "cache"))
    assert list(there.values()) == list(data_fingerprints(config(files, tmp_path)).values())
    assert len(there) == 2


def test_each_block_is_downloaded_once(on_s3: str, s3: Bucket, files: Path, tmp_path: Path):
    cfg = config(on_s3, tmp_path / "cache")
    s3.proxy.requests.clear()
    first = digests(cfg)
    gets = [path for method, path in s3.proxy.requests if method == "GET" and "json" not in path]
    sizes = [(path.stat().st_size, 2048 if path.suffix == ".bin" else 1024) for path in files.glob("[ab].*")]
    assert len(gets) <= sum(-(-size // block) for size, block in sizes)
    s3.proxy.requests.clear()
    assert digests(cfg) == first
    assert not [path for method, path in s3.proxy.requests if method == "GET" and "json" not in path]


READER = """
import sys
import threading
from pathlib import Path
from megatron_mtp.data import object_file
from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.fim import FillInTheMiddle
object_file.TOKEN_BLOCK, object_file.INDEX_BLOCK = 2048, 1024
from megatron_mtp.data.indexed import IndexedReader
reader = IndexedReader(sys.argv[1], object_file.ObjectCache(Path(sys.argv[2]), 1 << 26))
print(sum(int(reader.read(n).astype(int).sum()) * (n + 1) for n in range(len(reader))))
"""


def test_processes_of_a_machine_download_a_block_once(on_s3: str, s3: Bucket, files: Path, tmp_path: Path):
    reader = IndexedReader(f"{files}/a")
    expected = sum(int(reader.read(n).astype(int).sum()) * (n + 1) for n in range(len(reader)))
    s3.proxy.requests.clear()
    command = [sys.executable, "-c", READER, f"{on_s3}/a", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [int(process.communicate(timeout=60)[0]) for process in processes] == [expected] * 2
    gets = [path for method, path in s3.proxy.requests if method == "GET"]
    assert len(gets) == -(-reader.bin_size // 2048) + -(-reader.idx_size // 1024)


def test_the_blocks_of_a_batch_are_requested_at_the_same_time(on_s3: str, s3: Bucket, tmp_path: Path):
    data = build_data(config(on_s3, tmp_path / "cache"), DataPlacement(), 1)
    held = s3.inject(Fault("GET", ".bin", hold=threading.Event()))
    stream = data.train()
    for _ in range(1000):
        if held.count >= 8:
            break
        threading.Event().wait(0.02)
    assert held.count >= 8  # none has been answered yet
    s3.proxy.clear()
    next(stream)
    data.close()


# ---- faults ----

FAULTS = {
    "503": Fault("GET", "/corpus/", status=503, times=6),
    "throttled": Fault("GET", ".bin", status=503, code="SlowDown", times=6),
    "refused while it is opened": Fault("HEAD", ".idx", status=503, times=2),
    "cut in the middle": Fault("GET", ".bin", cut_at=700, times=4),
    "slow": Fault("GET", ".bin", delay_s=0.3, times=20),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_changes_nothing(name: str, on_s3: str, s3: Bucket, files: Path, tmp_path: Path):
    fault = s3.inject(FAULTS[name])
    local = digests(config(files, tmp_path), steps=12)
    assert digests(config(on_s3, tmp_path / "cache"), steps=12) == local
    assert fault.count > 0


def test_a_fault_that_stays_is_an_error_that_names_the_sample(few_attempts, on_s3: str, s3: Bucket, tmp_path: Path):
    cfg = config(on_s3, tmp_path / "cache")
    data = build_data(cfg, DataPlacement(), 1)
    s3.inject(Fault("GET", "/b.bin", status=500, code="InternalError"))
    with pytest.raises(DataError, match=r"/b, train sample \d+: .*/b\.bin: cannot be read any more .*InternalError"):
        list(itertools.islice(data.train(), 30))
    data.close()
    s3.proxy.clear()
    assert digests(cfg, steps=5) == digests(cfg, steps=5)


@pytest.mark.parametrize("size", ["another", "the same"])
def test_an_object_that_was_replaced_is_an_error(size: str, address: str, files: Path, tmp_path: Path):
    data = build_data(config(address, tmp_path / "cache", prefetch_steps=0), DataPlacement(), 1)
    content = (files / "b.bin").read_bytes()
    RemotePath(f"{address}/b.bin").write_bytes(content[::-1] if size == "the same" else content[:3000])
    with pytest.raises(DataError, match=r"/b\.bin: was replaced while it was in use"):
        list(itertools.islice(data.train(), 100))
    data.close()


def test_blocks_of_the_object_before_are_not_used(address: str, files: Path, tmp_path: Path):
    before = digests(config(address, tmp_path / "cache"))
    write_corpus(files / "b", [10, 90, 33, 1, 57] * 30, vocab_size=256, eod=256, seed=9)
    upload(files, address)
    after = digests(config(address, tmp_path / "cache"))
    assert after == digests(config(files, tmp_path))
    assert after != before


def test_an_object_that_was_deleted_is_an_error(address: str, tmp_path: Path):
    data = build_data(config(address, tmp_path / "cache", prefetch_steps=0), DataPlacement(), 1)
    RemotePath(f"{address}/b.bin").unlink()
    with pytest.raises(DataError, match=r"/b\.bin: was deleted while it was in use"):
        list(itertools.islice(data.train(), 100))
    data.close()


# ---- before a run ----


def test_what_is_missing_is_named_before_a_run(address: str, tmp_path: Path):
    RemotePath(f"{address}/a.bin").unlink()
    cfg = config(address, tmp_path / "cache", blend=[f"{address}/a", f"{address}/none"], valid_sets=None)
    with pytest.raises(DataError) as caught:
        check_data(cfg)
    assert f"{address}/a.bin: cannot be read (no such object)" in str(caught.value)
    assert f"{address}/none.idx: cannot be read (no such object)" in str(caught.value)


def test_a_bucket_that_is_missing_is_named(on_s3: str, tmp_path: Path):
    with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
        check_data(config("s3://nowhere/corpus", tmp_path / "cache"))


def test_a_sidecar_that_may_not_be_read_is_an_error(on_s3: str, s3: Bucket, tmp_path: Path):
    """It may be there, and say that the tokens are another tokenizer's."""
    s3.inject(Fault("GET", "a.json", status=403, code="AccessDenied"))
    with pytest.raises(DataError, match=r"a\.json: cannot be read .*Who may not list a bucket"):
        check_data(config(on_s3, tmp_path / "cache"))


def test_an_index_must_leave_room_for_tokens(address: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("megatron_mtp.data.sources.GIB", 2**16)
    with pytest.raises(DataError, match=r"object_storage_cache_gib = 0.0625: the indices .*Raise it to at least"):
        check_data(config(address, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("blend", "rule"),
    [
        (["hdfs://host/web"], "unknown kind of storage"),
        (["s3:///web"], "must name a bucket"),
        (["s3://bucket"], "must name a bucket"),
        (["s3://bucket/web"], "read through a cache on a local disk"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(blend: list, rule: str):
    cfg = config("unused", Path("unused"), blend=blend, valid_sets=None, object_storage_cache_path=None)
    with pytest.raises(ConfigError, match=rule):
        cfg.finalize()


def test_a_reader_without_a_cache_takes_no_address(address: str):
    with pytest.raises(DataError, match="must be a path on a mounted file system"):
        IndexedReader(f"{address}/a")


def test_the_cache_can_be_read_after_it_was_closed(on_s3: str, files: Path, tmp_path: Path):
    cache = ObjectCache(tmp_path / "cache", 1 << 26)
    reader = IndexedReader(f"{on_s3}/a", cache)
    cache.close()
    assert reader.read(1).tolist() == IndexedReader(f"{files}/a").read(1).tolist()
    cache.close()
