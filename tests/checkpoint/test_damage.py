"""Every file of a real checkpoint damaged in turn, and malicious checkpoints."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.checkpoint.pretrained import load_model_weights
from megatron_mtp.checkpoint.resuming import complete_checkpoints
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.remote_path import RemotePath
from tests.checkpoint.conftest import STORES, copy_run
from tests.checkpoint.rig import DENSE, differences, make_config, resumed, rig
from tests.checkpoint.writing import damage_file, describe_file

pytestmark = pytest.mark.dist

FILES = {"config.yaml", "train_state.json", ".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp", MANIFEST_NAME}


def save_two(path: str) -> tuple:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        run.steps(1)
        run.save()
        first = run.weights()
        run.steps(1)
        run.save()
        return first, run.weights()


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A directory with checkpoints 1 and 2, and their weights."""
    path = tmp_path_factory.mktemp("saved")
    return path, *ranks(2).run(save_two, str(path))[0]


@pytest.fixture(scope="module", params=STORES)
def stored(request):
    """The same, on files and on the S3 server."""
    if request.param == "files":
        return request.getfixturevalue("saved")
    folder = request.getfixturevalue("module_bucket").place("saved")
    return folder, *request.getfixturevalue("ranks")(2).run(save_two, str(folder))[0]


@pytest.fixture
def copy(stored, request):
    """A copy of it to damage."""
    if isinstance(stored[0], RemotePath):
        return copy_run(stored[0], request.getfixturevalue("s3").place())
    return copy_run(stored[0], request.getfixturevalue("tmp_path") / "run")


class Warnings(logging.Handler):
    """Collects what this rank would tell the user."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def listened() -> Iterator[list[str]]:
    """The warnings of a resume."""
    logger, told = logging.getLogger("megatron_mtp.checkpoint.resuming"), Warnings()
    logger.addHandler(told)
    try:
        yield told.texts
    finally:
        logger.removeHandler(told)


def what_is_found(path: str) -> tuple[int, list[str]]:
    with listened() as told:
        found = next(complete_checkpoints(make_config(DENSE, dist.get_world_size(), path), path, []))
    return found.manifest.iteration, told


def what_is_resumed(path: str) -> tuple:
    with listened() as told, rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        assert run.resume()
        return run.state.iteration, run.weights(), told


def test_the_checkpoint_has_the_files_this_test_damages(stored):
    assert {p.name for p in (stored[0] / "iter_0000002").iterdir()} == FILES


@pytest.mark.parametrize("how", ["truncated", "deleted", "bit-flipped"])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_found(ranks, copy, name, how):
    path = copy
    damage_file(path / "iter_0000002" / name, how)
    (first, told), (second, silent) = ranks(2).run(what_is_found, str(path))
    assert first == second == 1
    assert any(f"iter_0000002/{name}" in text and "damaged and skipped" in text for text in told)
    assert silent == [], "one rank tells it"


def test_the_checkpoint_before_is_what_is_loaded(ranks, stored, copy):
    path, saved = copy, stored
    damage_file(path / "iter_0000002" / "__1_0.distcp", "bit-flipped")
    start, weights = ranks(2).run(resumed, DENSE, 1, str(path))[0]
    assert start == 1
    assert differences(saved[1], weights) == {}
    # Going on from there replaces the damaged one.
    assert ranks(2).run(resume_and_save, str(path))[0] == [2, 1]
    assert differences(saved[2], ranks(2).run(resumed, DENSE, 2, str(path))[0][1]) == {}


def resume_and_save(path: str) -> list[int]:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
        assert run.resume()
        run.steps(1)
        run.save()
        return run.checkpointer.directory.iterations()


def refused(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        next(complete_checkpoints(make_config(DENSE, dist.get_world_size(), path), path, []))
    return str(caught.value)


def test_where_nothing_is_whole_every_rank_stops_and_every_file_is_named(ranks, copy):
    path = copy
    damage_file(path / "iter_0000001" / "__0_0.distcp", "bit-flipped")
    damage_file(path / "iter_0000002" / ".metadata", "bit-flipped")
    for message in ranks(2).run(refused, str(path)):
        assert "none of its checkpoints is complete" in message
        assert "iter_0000001/__0_0.distcp" in message
        assert "iter_0000002/.metadata" in message


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def forge(whole: Path) -> None:
    """Gives a changed checkpoint a manifest with correct checksums, as an attacker would."""
    manifest = read_manifest_of_changed(whole)
    files = [describe_file(whole / entry.name) for entry in manifest.files]
    (whole / MANIFEST_NAME).write_bytes(replace(manifest, files=files).to_bytes())


def read_manifest_of_changed(whole: Path):
    from megatron_mtp.checkpoint.manifest import Manifest

    return Manifest.from_bytes((whole / MANIFEST_NAME).read_bytes())


def replace_object(whole: Path, prefix: str, content: bytes) -> None:
    """Puts other bytes in place of a stored object: at the end of its file, with the metadata pointing there."""
    metadata = read_metadata(whole)
    index = next(index for index in metadata.storage_data if index.fqn.startswith(prefix))
    info = metadata.storage_data[index]
    file = whole / info.relative_path
    info.offset, info.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    (whole / ".metadata").write_bytes(pickle.dumps(metadata))


def pickled_by_torch(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


@pytest.mark.parametrize("where", ["metadata", "metadata inside", "common_state", "rng_state"])
def test_a_malicious_checkpoint_executes_nothing(ranks, saved, tmp_path, where):
    path, target = shutil.copytree(saved[0], tmp_path / "run"), tmp_path / "owned"
    whole = path / "iter_0000002"
    if where == "metadata":
        (whole / ".metadata").write_bytes(pickle.dumps(Attack(target)))
    elif where == "metadata inside":
        (whole / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=Attack(target))))
    else:
        replace_object(whole, where, pickled_by_torch(Attack(target)))
    forge(whole)
    assert read_manifest(whole), "the forged manifest must be intact, or checksums alone refuse it"
    assert RunDirectory(path).damages(read_manifest(whole)) == []
    (iteration, told), _ = ranks(2).run(what_is_found, str(path))
    assert iteration == 1
    assert any("iter_0000002" in text and "mkdir" in text for text in told), told
    assert not target.exists()


def test_the_attack_would_have_worked(saved, tmp_path):
    """Without the look through, torch's own reader runs it: the tests above can fail."""
    path, target = shutil.copytree(saved[0], tmp_path / "run"), tmp_path / "owned"
    (path / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Attack(target)))
    reader = torch.distributed.checkpoint.FileSystemReader(path / "iter_0000002")
    with pytest.raises(AttributeError, match="storage_meta"):
        reader.read_metadata()
    assert target.exists()


def test_metadata_cannot_lead_to_files_elsewhere(saved, tmp_path):
    whole = shutil.copytree(saved[0] / "iter_0000002", tmp_path / "iter_0000002")
    metadata = read_metadata(whole)
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (whole / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"leads to '\.\./secret'"):
        read_metadata(whole)


def test_a_config_that_names_code_is_refused(saved, tmp_path):
    path, target = shutil.copytree(saved[0], tmp_path / "run"), tmp_path / "owned"
    whole = path / "iter_0000002"
    (whole / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{target}']\n")
    forge(whole)
    with pytest.raises(CheckpointError, match=r"iter_0000002/config\.yaml"):
        check_run_directory(make_config(DENSE, 2, str(path)))
    assert not target.exists()


TENSOR = "decoder.final_layernorm.weight"


def make_unreadable(whole: Path, how: str, target: Path) -> None:
    """A tensor that its checksums pass and torch's reader does not."""
    if how == "malicious":
        replace_object(whole, TENSOR, pickled_by_torch(Attack(target)))
    else:  # as if the disk failed after its bytes were compared
        metadata = read_metadata(whole)
        next(info for index, info in metadata.storage_data.items() if index.fqn == TENSOR).length = 10
        (whole / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(whole)


def weights_of_folder(folder: Path) -> str:
    with rig(make_config(DENSE, dist.get_world_size())) as run, pytest.raises(CheckpointError) as caught:
        load_model_weights(folder, run.chunks, run.run.groups.dp_cp)
    return str(caught.value)


@pytest.mark.parametrize("how", ["malicious", "cut"])
def test_a_tensor_that_cannot_be_read_is_damage(ranks, saved, tmp_path, how):
    """Torch's own exception is not an Exception, and its text recommends loading without restrictions."""
    path, target = shutil.copytree(saved[0], tmp_path / "run"), tmp_path / "owned"
    whole = path / "iter_0000002"
    make_unreadable(whole, how, target)
    (iteration, weights, told), (second, _, silent) = ranks(2).run(what_is_resumed, str(path))
    assert iteration == second == 1
    assert differences(saved[1], weights) == {}
    assert silent == []
    refusals = ranks(2).run(weights_of_folder, whole)
    with pytest.raises(CheckpointError) as caught:
        StoredWeights(path).whole(TENSOR)
    for text in (*told, *refusals, str(caught.value)):
        assert str(whole) in text
        assert "weights_only" not in text
        assert how != "malicious" or "mkdir" in text
    assert all("name another checkpoint by its folder" in text for text in (*refusals, str(caught.value)))
    assert len(told) == 1
    assert not target.exists()


def test_where_no_tensor_can_be_read_every_checkpoint_is_named(ranks, copy, tmp_path):
    path = copy
    for name in ("iter_0000001", "iter_0000002"):
        make_unreadable(path / name, "cut", tmp_path)
    for message in ranks(2).run(not_resumed, str(path)):
        assert "none of its checkpoints is complete" in message
        assert "iter_0000001: cannot be read" in message
        assert "iter_0000002: cannot be read" in message


def not_resumed(path: str) -> str:
    with rig(make_config(DENSE, dist.get_world_size(), path)) as run, pytest.raises(CheckpointError) as caught:
        run.resume()
    return str(caught.value)


def test_a_train_state_without_sense_is_damage(ranks, saved, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "run")
    file = path / "iter_0000002" / "train_state.json"
    values = json.loads(file.read_text())
    values["train"]["consumed_samples"] = -5
    file.write_text(json.dumps(values))
    forge(path / "iter_0000002")
    (iteration, told), _ = ranks(2).run(what_is_found, str(path))
    assert iteration == 1
    assert f"{file}: is damaged (consumed_samples = -5 should be int of at least 0)" in told[0]


def test_a_shard_without_a_checksum_is_damage(ranks, saved, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "run")
    whole = path / "iter_0000002"
    manifest = read_manifest(whole)
    files = [entry for entry in manifest.files if entry.name != "__1_0.distcp"]
    (whole / MANIFEST_NAME).write_bytes(replace(manifest, files=files).to_bytes())
    (iteration, told), _ = ranks(2).run(what_is_found, str(path))
    assert iteration == 1
    assert "leads to '__1_0.distcp', which the manifest does not list" in told[0]
    with pytest.raises(CheckpointError, match="which the manifest does not list"):
        StoredWeights(path)
