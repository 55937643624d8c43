"""A checkpoint is whole or it is not: every kind of damage to every file is named, and the one before it is taken."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.checkpoint.directory import LATEST_NAME, RunDirectory, checkpoint_folder
from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.remote_path import RemotePath
from tests.checkpoint.writing import damage_file, write_checkpoint

pytestmark = pytest.mark.unit

FILES = ["config.yaml", "train_state.json", ".metadata", "metadata.json", "__0_0.distcp", MANIFEST_NAME]


def find(directory: RunDirectory) -> tuple[int | None, list[str]]:
    """The newest whole checkpoint, all checksums compared, and what is wrong with newer ones."""
    problems = []
    for iteration in directory.iterations():
        try:
            manifest = directory.read(iteration)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if not (damaged := directory.damages(manifest)):
            return iteration, problems
        problems += damaged
    return None, problems


@pytest.mark.parametrize("how", ["truncated", "deleted", "bit-flipped"])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_named_and_the_one_before_is_taken(folder, name, how):
    write_checkpoint(folder, 100)
    newer = write_checkpoint(folder, 200)
    damage_file(newer / name, how)
    iteration, problems = find(RunDirectory(folder))
    assert iteration == 100
    assert len(problems) == 1
    assert str(newer / name) in problems[0]


def test_every_single_bit_of_a_manifest_counts(folder):
    whole = write_checkpoint(folder, 7)
    raw = (whole / MANIFEST_NAME).read_bytes()
    for position in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            with pytest.raises((ValueError, TypeError, KeyError)):
                Manifest.from_bytes(bytes(changed))


def test_a_manifest_moved_to_another_iteration_is_refused(tmp_path):
    write_checkpoint(tmp_path, 100).rename(tmp_path / "iter_0000300")
    with pytest.raises(CheckpointError, match="belongs to iteration 100"):
        RunDirectory(tmp_path).read(300)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", MANIFEST_NAME])
def test_a_manifest_cannot_name_files_elsewhere(name):
    raw = Manifest(iteration=1, files=[FileEntry(name, 1, "0")]).to_bytes()
    with pytest.raises(ValueError, match="leads out"):
        Manifest.from_bytes(raw)


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="format version 2"):
        Manifest.from_bytes(Manifest(iteration=1, files=[], format_version=2).to_bytes())


def test_a_file_that_older_loaders_would_read_is_refused(folder):
    whole = write_checkpoint(folder, 1)
    (whole / "common.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"common\.pt: does not belong"):
        read_manifest(whole)


def test_what_was_interrupted_is_never_taken_and_is_cleared(folder):
    write_checkpoint(folder, 100)
    directory = RunDirectory(folder)
    partial = directory.begin(200)
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert directory.iterations() == [100]
    assert directory.clear_remains() == [partial.name]
    assert not partial.exists()
    assert find(directory) == (100, [])


def test_latest_file_is_written_and_not_trusted(folder):
    write_checkpoint(folder, 100)
    assert (folder / LATEST_NAME).read_text() == "100\n"
    (folder / LATEST_NAME).write_bytes(b"999\n")
    assert find(RunDirectory(folder)) == (100, [])


def test_a_damaged_one_is_replaced_when_its_iteration_comes_again(folder):
    damage_file(write_checkpoint(folder, 100) / "__0_0.distcp", "truncated")
    write_checkpoint(folder, 100, replaceable={100})
    assert find(RunDirectory(folder)) == (100, [])
    assert sorted(p.name for p in folder.iterdir()) == ["iter_0000100", LATEST_NAME]


def test_one_that_this_run_does_not_know_is_not_replaced(folder):
    whole = write_checkpoint(folder, 100)
    before = (whole / MANIFEST_NAME).read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(folder, 100, validation_loss=1.0, replaceable={99})
    assert (whole / MANIFEST_NAME).read_bytes() == before


def test_a_vanished_directory_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunDirectory(tmp_path / "gone").begin(1)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 40), max_size=8), st.sets(st.integers(1, 40), max_size=3), st.integers(-1, 5))
def test_retention_keeps_the_newest_whole_ones(tmp_path_factory, iterations, damaged, keep):
    path = tmp_path_factory.mktemp("run")
    for iteration in iterations:
        write_checkpoint(path, iteration)
    damaged &= iterations
    for iteration in damaged:
        damage_file(path / f"iter_{iteration:07d}" / MANIFEST_NAME, "truncated")
    whole = sorted(iterations - damaged, reverse=True)
    directory = RunDirectory(path)
    removed = directory.retain(keep)
    expected = whole if keep < 0 else whole[: max(1, keep)]
    assert set(directory.iterations()) == set(expected) | damaged
    assert set(removed) == set(whole) - set(expected)


def test_what_the_rules_for_every_and_best_keep(folder):
    losses = {100: 3.0, 200: 2.5, 300: 2.7, 400: None, 500: 2.9, 600: 2.8}
    for iteration, loss in losses.items():
        write_checkpoint(folder, iteration, validation_loss=loss)
    directory = RunDirectory(folder)
    assert directory.retain(1, keep_every=500, keep_best=2) == [400, 100]
    assert directory.iterations() == [600, 500, 300, 200]
    # A better one later displaces the worst of the best; what is kept for its number stays.
    write_checkpoint(folder, 700, validation_loss=2.6)
    assert directory.retain(1, keep_every=500, keep_best=2) == [600, 300]
    assert directory.iterations() == [700, 500, 200]


def test_iterations_beyond_seven_digits_are_found(folder):
    write_checkpoint(folder, 12_345_678)
    write_checkpoint(folder, 9_999_999)
    assert RunDirectory(folder).iterations() == [12_345_678, 9_999_999]


def test_the_manifest_is_readable(folder):
    text = json.loads((write_checkpoint(folder, 5) / MANIFEST_NAME).read_text())
    assert text["manifest"]["iteration"] == 5
    assert {entry["name"] for entry in text["manifest"]["files"]} == set(FILES) - {MANIFEST_NAME}


def test_who_reads_weights_gets_the_newest_or_says_which(folder):
    older, newest = write_checkpoint(folder, 100), write_checkpoint(folder, 200)
    assert checkpoint_folder(folder) == newest
    assert checkpoint_folder(older) == older


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in ("truncated", "deleted")]
    + [(name, "bit-flipped") for name in ("config.yaml", "train_state.json", MANIFEST_NAME)],
)
def test_who_reads_weights_never_gets_an_older_one_by_itself(folder, name, how):
    """The checksums of large files are compared by the reader, which refuses with the same words."""
    older, newest = write_checkpoint(folder, 100), write_checkpoint(folder, 200)
    damage_file(newest / name, how)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder(folder)
    assert f"{newest}: the checkpoint is damaged" in str(caught.value)
    assert f"name another checkpoint by its folder, such as {older}." in str(caught.value)
    assert f"{newest / name}: " in str(caught.value)


def test_a_run_directory_without_a_checkpoint_is_named(folder):
    (folder / "notes").write_bytes(b"")  # object storage has no empty folders
    with pytest.raises(CheckpointError, match=r": holds no checkpoint\.$"):
        checkpoint_folder(folder)
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such directory"):
        checkpoint_folder(folder / "nowhere")
    write_checkpoint(folder / "checkpoints", 100)
    with pytest.raises(CheckpointError, match=rf"Did you mean {folder / 'checkpoints'}\?"):
        checkpoint_folder(folder)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__0_0.distcp", MANIFEST_NAME}))
def test_a_manifest_must_list_what_every_checkpoint_has(folder, name):
    """What it does not list has no checksum."""
    manifest = read_manifest(write_checkpoint(folder, 1))
    files = [entry for entry in manifest.files if entry.name != name]
    with pytest.raises(ValueError, match=f"does not list {name}"):
        Manifest.from_bytes(Manifest(iteration=1, files=files).to_bytes())


@pytest.mark.parametrize("act", ["complete", "remove"])
def test_a_look_beside_a_save_or_a_removal_finds_no_damage(s3, monkeypatch, act):
    """Between two requests of the look the other process goes on."""
    directory = RunDirectory(s3.place())
    whole = write_checkpoint(s3.place(), 100)
    manifest = (whole / MANIFEST_NAME).read_bytes()
    remove = directory._completion.retire(100)
    is_file = RemotePath.is_file

    def look(path: RemotePath) -> bool:
        found = is_file(path)
        if path.name == MANIFEST_NAME:
            monkeypatch.setattr(RemotePath, "is_file", is_file)
            if act == "complete":
                directory._completion.complete(100, manifest, may_replace=True)
            else:
                remove()
        return found

    monkeypatch.setattr(RemotePath, "is_file", look)
    assert directory.iterations() == ([100] if act == "complete" else [])
