"""Malicious checkpoints in the right format with correct checksums: nothing runs, nothing else is written,
nothing is read for ever, and the file is named."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_mtp.checkpoint.directory import LATEST_NAME, RunDirectory
from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.checkpoint.untrusted import METADATA_NAME, read_metadata
from megatron_mtp.errors import CheckpointError
from megatron_mtp.recipes import get_recipe
from tests.checkpoint.writing import describe_file, write_checkpoint

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def forged(whole: Path, **values: object) -> None:
    """Other values in a manifest, with the checksum that belongs to them."""
    manifest = Manifest.from_bytes((whole / MANIFEST_NAME).read_bytes())
    for name, value in values.items():
        object.__setattr__(manifest, name, value)
    (whole / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def entries(**values: object) -> list[dict]:
    return [{"name": "a", "size": 1, "sha256": "0" * 64} | values]


@pytest.mark.parametrize(
    "values",
    [
        *({"files": entries(name=name)} for name in ("", "a\0b", "a b", "a\nb", "ä", 5, None, ["a"])),
        *({"files": entries(size=size)} for size in (-1, "1", True, 1.0, None)),
        *({"files": entries(sha256=digest)} for digest in ("", "0" * 63, "G" * 64, 7)),
        *({"files": files} for files in ("ab", 3, None, [[]], [{"name": "a"}], [{**entries()[0], "more": 1}])),
        *({"iteration": value} for value in ("200", -1, 2.0, None, True)),
        *({"consumed_samples": value} for value in ("1", -1, 0.5)),
        *({"validation_loss": value} for value in ("1", [1], True)),
        *({"validation_losses": value} for value in (["a"], {"a": "1"}, {"a": True}, None)),
        *({name: 5} for name in ("tokenizer", "best_metric")),
        *({"data": data} for data in ("a", [5], None)),
    ],
    ids=str,
)
def test_a_manifest_with_values_of_another_kind_is_damaged(tmp_path: Path, values: dict):
    write_checkpoint(tmp_path, 100)
    forged(write_checkpoint(tmp_path, 200), **values)
    manifest, problems = RunDirectory(tmp_path).newest_listed()
    assert manifest.iteration == 100
    assert len(problems) == 1
    assert f"iter_0000200/{MANIFEST_NAME}: is damaged" in problems[0]
    assert RunDirectory(tmp_path).retain(1) == [], "nothing is removed because of it"


@pytest.mark.parametrize("how", ["nested", "not UTF-8", "long number", "large", "a pipe", "a folder"])
def test_a_manifest_that_is_no_manifest(tmp_path: Path, how: str):
    write_checkpoint(tmp_path, 100)
    file = write_checkpoint(tmp_path, 200) / MANIFEST_NAME
    file.unlink()
    if how == "a pipe":
        os.mkfifo(file)
    elif how == "a folder":
        file.mkdir()
    elif how == "large":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        file.write_bytes({"nested": b"[" * 10**6, "not UTF-8": b"\xff\xfe\x00", "long number": b"9" * 10**5}[how])
    manifest, problems = RunDirectory(tmp_path).newest_listed()
    assert manifest.iteration == 100
    assert str(file) in problems[0]


@pytest.mark.parametrize("how", ["a pipe", "a device", "a folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, how: str):
    write_checkpoint(tmp_path, 100)
    whole = write_checkpoint(tmp_path, 200)
    file = whole / "__0_0.distcp"
    file.unlink()
    if how == "a pipe":
        os.mkfifo(file)
    elif how == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    others = [entry for entry in read_manifest(tmp_path / "iter_0000100").files if entry.name != file.name]
    forged(whole, files=[*entries(name=file.name, size=0), *map(asdict, others)])
    manifest, problems = RunDirectory(tmp_path).newest_listed()
    assert manifest.iteration == 100
    assert problems == [f"{file}: is not a file."]


@pytest.mark.parametrize("name", [f".{LATEST_NAME}.new", LATEST_NAME])
def test_a_link_in_a_run_directory_is_not_written_through(tmp_path: Path, name: str):
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    write_checkpoint(run, 100)
    assert precious.read_text() == "as it was"
    assert (run / LATEST_NAME).read_text() == "100\n"


def test_links_to_folders_elsewhere_are_not_followed_when_remains_are_cleared(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    run = tmp_path / "run"
    write_checkpoint(run, 100)
    (run / "iter_0000200.partial").symlink_to(precious)
    RunDirectory(run).clear_remains()
    (run / "iter_0000050").symlink_to(run / "iter_0000100")
    RunDirectory(run).retain(1)
    assert (precious / "file").exists()
    assert RunDirectory(run).read(100)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "text",
        "",
        "model: text",
        "model: [1]",
        "1: {}",
        "model: {1: 2}",
        "model: {? [a] : b}",
        "a: &a [x]\nb: *a",
        "model: {x: !!int text}",
        "model: {x: !!python/name:os.system }",
        f"model: {{x: {'9' * 5000}}}",
        "[" * 2000,
        "\0",
        pytest.param("{" + ", ".join(f"k{i}: {{}}" for i in range(500)) + "}", id="many keys"),
    ],
    ids=lambda text: text[:20],
)
def test_a_config_that_is_no_config_is_refused_by_name(tmp_path: Path, text: str):
    whole = write_checkpoint(tmp_path, 100)
    (whole / "config.yaml").write_text(text)
    files = [describe_file(file) for file in sorted(whole.iterdir()) if file.name != MANIFEST_NAME]
    forged(whole, files=files)
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path)
    cfg.finalize(1)
    with pytest.raises(CheckpointError, match=r"iter_0000100/config\.yaml|belongs to a run with another config"):
        check_run_directory(cfg)


class Calls:
    """Unpickled, it calls something."""

    def __init__(self, function: object, *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def named(module: str, name: str) -> bytes:
    """A pickle that names something and no more."""
    return b"\x80\x04" + pickle.dumps(module, 0)[:-1] + pickle.dumps(name, 0)[:-1] + b"\x93."


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Calls(os.system, "exit 1")),
        pickle.dumps(Calls(eval, "1")),
        pickle.dumps(Calls(getattr, dcp.Metadata, "__init__")),
        pickle.dumps(Calls(torch.load, "file")),
        pickle.dumps(dcp.Metadata({"a": Calls(exec, "1")}, storage_data={})),
        named("os", "system"),
        named("builtins", "eval"),
        named("torch", "load"),
        named("torch", "hub"),
        named("torch", "float32.__class__"),
        named("torch.distributed.checkpoint.metadata", "os"),
        named("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        named("torch.serialization", "_get_layout.__globals__"),
        named("torch.distributed.checkpoint.filesystem", "subprocess"),
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x04U\x01aQ.",  # a persistent id
        b"",
        b"\x80\x04" + b"(" * 100_000,
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(dcp.Metadata({}, storage_data=None)),
        pickle.dumps(dcp.Metadata({}, storage_data={dcp.MetadataIndex("a"): _StorageInfo("..", 0, 1)})),
        pickle.dumps(dcp.Metadata({}, storage_data={dcp.MetadataIndex("a"): _StorageInfo("", 0, 1)})),
        pickle.dumps(dcp.Metadata({}, storage_data={dcp.MetadataIndex("a"): _StorageInfo("/etc/passwd", 0, 1)})),
        pickle.dumps(dcp.Metadata({}, storage_data={dcp.MetadataIndex("a"): _StorageInfo(7, 0, 1)})),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_metadata_that_is_none_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / METADATA_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: is not a checkpoint's metadata"):
        read_metadata(tmp_path)


def changed(target: object, name: str) -> bytes:
    """A pickle of sound metadata that sets an attribute of something it names on the way."""
    state = pickle.dumps((None, {name: 1}), 2)[2:-1]
    return b"\x80\x02" + pickle.dumps(target, 2)[2:-1] + state + b"b0" + pickle.dumps(dcp.Metadata({}), 2)[2:]


@pytest.mark.parametrize(
    "target",
    [
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.TensorProperties,
        _StorageInfo,
        dcp._MEM_FORMAT_ENCODING,
        torch.serialization._get_layout,
        next(iter(dcp._MEM_FORMAT_ENCODING)),
    ],
    ids=lambda target: getattr(target, "__name__", str(target)),
)
def test_a_pickle_that_changes_what_it_names_is_refused(tmp_path: Path, target: object):
    (tmp_path / METADATA_NAME).write_bytes(changed(target, "poison"))
    with pytest.raises(CheckpointError, match=r"\.metadata: is not a checkpoint's metadata"):
        read_metadata(tmp_path)
    assert not hasattr(target, "poison")


def test_that_change_would_have_been_made():
    pickle.loads(changed(dcp.Metadata, "poison"))
    assert dcp.Metadata.poison == 1
    del dcp.Metadata.poison


def test_sound_metadata_passes(tmp_path: Path):
    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.bfloat16),
        torch.Size([2]),
        [dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))],
    )
    (tmp_path / "file").touch()
    places = {dcp.MetadataIndex("a", torch.Size([0])): _StorageInfo("file", 0, 1)}
    expected = dcp.Metadata({"a": tensor}, storage_data=places)
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(expected))
    assert read_metadata(tmp_path) == expected
