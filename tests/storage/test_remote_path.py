"""Objects as paths, on a real S3 server, also while it fails."""

from __future__ import annotations

import builtins
import pickle
import random
from pathlib import Path

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.storage import connection
from megatron_mtp.storage.address import FORM_RULE, UNKNOWN_RULE, address_problem
from megatron_mtp.storage.place import new_file, place, remove_tree, replace_durably, write_durably
from megatron_mtp.storage.remote_path import RemotePath
from tests.harness.s3 import Fault

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)


@pytest.fixture
def folder(s3):
    return s3.place()


def test_an_object_is_read_as_it_was_written(folder):
    content = bytes(range(256)) * 40
    with new_file(folder / "a" / "part") as stream:
        stream.write(content[:5000])
        stream.write(content[5000:])
    found = folder / "a" / "part"
    assert found.read_bytes() == content
    assert found.stat().st_size == len(content)
    with found.open() as stream:
        stream.seek(300)
        assert stream.read(20) == content[300:320]
        assert stream.read() == content[320:]
    assert pickle.loads(pickle.dumps(found)).read_bytes() == content


def test_an_object_of_several_parts_and_requests(folder, monkeypatch):
    monkeypatch.setattr("megatron_mtp.storage.remote_path.PART_BYTES", 5 << 20)
    monkeypatch.setattr("megatron_mtp.storage.remote_path.READ_BYTES", 1 << 20)
    content = bytes(range(256)) * (11 << 12) + b"end"
    with new_file(folder / "large") as stream:
        for start in range(0, len(content), 3 << 20):
            stream.write(content[start : start + (3 << 20)])
    with (folder / "large").open() as stream:
        assert stream.read() == content


def test_folders_are_what_is_in_them(folder):
    assert not folder.exists()
    for name in ("iter_1/a", "iter_1/b", "iter_10/c", "d"):
        write_durably(folder / name, b"12345")
    assert sorted(folder.entries()) == ["d", "iter_1", "iter_10"]
    assert {name: one.st_size for name, one in (folder / "iter_1").entries().items()} == {"a": 5, "b": 5}
    assert (folder / "iter_1").is_dir()
    assert (folder / "d").is_file()
    remove_tree(folder / "iter_1")
    assert sorted(folder.entries()) == ["d", "iter_10"]
    remove_tree(folder / "iter_1")


def test_one_object_takes_the_place_of_another_at_once(folder):
    replace_durably(folder / "x", b"1")
    replace_durably(folder / "x", b"2")
    assert (folder / "x").read_bytes() == b"2"
    with pytest.raises(FileExistsError, match="exists already"):
        (folder / "x").create(b"3")
    (folder / "x").unlink()
    (folder / "x").unlink(missing_ok=True)
    (folder / "x").create(b"3")
    with pytest.raises(FileNotFoundError, match="no such object"):
        (folder / "y").read_bytes()


@pytest.mark.parametrize("size", [100, 12 << 20])
def test_an_exception_leaves_no_object(folder, monkeypatch, size):
    monkeypatch.setattr("megatron_mtp.storage.remote_path.PART_BYTES", 5 << 20)

    def write_half():
        with new_file(folder / "x") as stream:
            stream.write(b"1" * size)
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert not (folder / "x").exists()


TRANSIENT = {
    "refused": Fault("GET", "/x", status=503, times=2),
    "throttled": Fault("GET", "/x", status=503, code="SlowDown", times=1),
    "cut": Fault("GET", "/x", cut_at=700, times=3),
    "slow": Fault("GET", "/x", delay_s=0.3, times=1),
}


@pytest.mark.parametrize("how", TRANSIENT)
def test_a_read_that_fails_for_a_moment_is_repeated(s3, folder, how):
    write_durably(folder / "x", b"1" * 1000)
    fault = s3.inject(TRANSIENT[how])
    with (folder / "x").open() as stream:
        assert stream.read() == b"1" * 1000
    assert fault.count == fault.times


FAILED_WRITES = [Fault("PUT", "/x", status=503, times=1), Fault("PUT", "/x", cut_request=True, times=1)]


@pytest.mark.parametrize("fault", FAILED_WRITES)
def test_a_write_that_fails_for_a_moment_is_repeated(s3, folder, fault):
    s3.inject(fault)
    write_durably(folder / "x", b"1" * 1000)
    assert (folder / "x").read_bytes() == b"1" * 1000
    assert fault.count == fault.times


@pytest.mark.parametrize("status", [403, 507])
def test_a_refusal_that_stays_is_reported_at_once(s3, folder, status):
    fault = s3.inject(Fault("PUT", "/x", status=status, code="QuotaExceeded"))
    with pytest.raises(OSError, match="injected QuotaExceeded"):
        write_durably(folder / "x", b"1")
    assert fault.count == 1


def test_what_is_wrong_is_said(s3, monkeypatch):
    with pytest.raises(OSError, match="there is no bucket 'no-such-bucket'"):
        (RemotePath("s3://no-such-bucket/run") / "x").write_bytes(b"1")
    with pytest.raises(OSError, match="there is no bucket 'no-such-bucket'"):
        RemotePath("s3://no-such-bucket/run").entries()
    monkeypatch.setattr(connection, "REQUEST_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    connection._driver.cache_clear()
    with pytest.raises(OSError, match="Could not connect to the endpoint URL"):
        (s3.place() / "x").write_bytes(b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    connection._driver.cache_clear()
    with pytest.raises(OSError, match="no credentials were found"):
        (s3.place() / "x").write_bytes(b"1")
    connection._driver.cache_clear()


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **values):
        if name.split(".")[0] == "gcsfs":
            raise ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")
        return original(name, *args, **values)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mtp\[gs\]'"):
        place("gs://bucket/run")


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_the_version_of_an_object_changes_with_it(kind, request):
    folder = request.getfixturevalue("folder") if kind == "s3" else RemotePath("memory://tests-of-versions/run")
    (folder / "x").write_bytes(b"12")
    first = (folder / "x").version()
    assert first == (folder / "x").version()
    assert first[0] == 2
    (folder / "x").write_bytes(b"13")
    assert (folder / "x").version() != first
    for missing in (folder / "y", folder):
        with pytest.raises(FileNotFoundError):
            missing.version()


def test_addresses_and_paths():
    assert place("runs/mine") == Path("runs/mine")
    assert place("memory://tests/x") == RemotePath("memory://tests/x")
    assert address_problem("hdfs://host/run") == UNKNOWN_RULE
    for wrong in ("s3://bucket", "s3://", "s3:///x", "s3://b/../x", "s3://b/x?versionId=1", "s3://b/x y"):
        assert address_problem(wrong) == FORM_RULE
    run = RemotePath("s3://bucket/runs/mine/")
    assert (str(run), run.name, str(run.parent)) == ("s3://bucket/runs/mine", "mine", "s3://bucket/runs")
    assert RemotePath(Path("s3://bucket/run")) == RemotePath("s3://bucket/run")


def test_memory():
    folder = RemotePath("memory://tests-of-paths/run")
    with new_file(folder / "x") as stream:
        stream.write(b"12")
    assert (folder / "x").read_bytes() == b"12"
    assert list(folder.entries()) == ["x"]
    remove_tree(folder)
    assert not folder.exists()


def test_pauses_leave_the_random_state_of_a_run_alone(s3, folder):
    write_durably(folder / "x", b"1" * 1000)
    before = random.getstate()
    s3.inject(Fault("GET", "/x", status=503, times=1))
    s3.inject(Fault("GET", "/x", cut_at=700, times=2))
    with (folder / "x").open() as stream:
        assert stream.read() == b"1" * 1000
    assert random.getstate() == before
    assert sum(method == "GET" for method, _ in s3.proxy.requests) == 4
