"""When a run starts afresh, resumes, or is refused before anything starts, and that nothing is written meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.errors import CheckpointError
from tests.checkpoint.writing import damage_file, write_checkpoint

pytestmark = pytest.mark.unit


def make_config(save: Path | None = None, load: Path | None = None) -> ConfigContainer:
    cfg = ConfigContainer()
    cfg.model.update(mtp_num_layers=0, virtual_pipeline_model_parallel_size=1)  # as finalize fills them
    cfg.checkpoint.save = None if save is None else str(save)
    cfg.checkpoint.load = None if load is None else str(load)
    return cfg


def listing(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_no_directories_is_a_fresh_start():
    assert check_run_directory(make_config()) is None


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_absent_directory_that_is_both_is_a_fresh_start(tmp_path, exists):
    run = tmp_path / "run"
    if exists:
        run.mkdir()
    assert check_run_directory(make_config(run, run)) is None
    assert run.exists() == exists


def test_the_same_directory_by_another_path_is_the_same(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert check_run_directory(make_config(tmp_path / "run", tmp_path / "link")) is None


def test_resumes_from_the_newest(tmp_path):
    cfg = make_config(tmp_path, tmp_path)
    write_checkpoint(tmp_path, 100, cfg)
    write_checkpoint(tmp_path, 200, cfg)
    before = listing(tmp_path)
    point = check_run_directory(cfg)
    assert (point.iteration, point.consumed_samples, point.damaged, point.changes) == (200, 800, [], [])
    assert listing(tmp_path) == before


def test_a_damaged_one_is_named_and_skipped(tmp_path):
    cfg = make_config(tmp_path, tmp_path)
    write_checkpoint(tmp_path, 100, cfg)
    damage_file(write_checkpoint(tmp_path, 200, cfg) / "config.yaml", "bit-flipped")
    point = check_run_directory(cfg)
    assert point.iteration == 100
    assert "iter_0000200/config.yaml: its checksum does not match" in point.damaged[0]


def test_only_damaged_ones_is_no_fresh_start(tmp_path):
    cfg = make_config(tmp_path, tmp_path)
    damage_file(write_checkpoint(tmp_path, 200, cfg) / "__0_0.distcp", "truncated")
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints is complete[\s\S]*__0_0.distcp: has 1023 bytes"
    ):
        check_run_directory(cfg)


def test_a_used_directory_without_load_is_refused_with_the_way_out(tmp_path):
    write_checkpoint(tmp_path, 300)
    with pytest.raises(CheckpointError) as caught:
        check_run_directory(make_config(tmp_path))
    assert "newest of iteration 300" in str(caught.value)
    assert f"set checkpoint.load={tmp_path}; for a new run choose another directory" in str(caught.value)


def test_a_used_directory_is_not_written_from_another_run(tmp_path):
    write_checkpoint(tmp_path / "a", 10)
    write_checkpoint(tmp_path / "b", 20)
    with pytest.raises(CheckpointError, match=r"is another run, whose checkpoints would mix[\s\S]*copy the folder"):
        check_run_directory(make_config(tmp_path / "b", tmp_path / "a"))


def test_a_copied_checkpoint_begins_a_branch_that_resumes_from_itself(tmp_path):
    for iteration in (10, 20):
        write_checkpoint(tmp_path / "a", iteration)
    shutil.copytree(tmp_path / "a/iter_0000010", tmp_path / "b/iter_0000010")
    cfg = make_config(tmp_path / "b", tmp_path / "b")
    assert check_run_directory(cfg).iteration == 10
    write_checkpoint(tmp_path / "b", 15)
    assert check_run_directory(cfg).iteration == 15


def test_a_branch_into_a_new_directory_resumes(tmp_path):
    write_checkpoint(tmp_path / "a", 10)
    assert check_run_directory(make_config(tmp_path / "b", tmp_path / "a")).iteration == 10


def test_load_elsewhere_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        check_run_directory(make_config(tmp_path / "b", tmp_path / "a"))


def test_exit_on_missing_checkpoint(tmp_path):
    cfg = make_config(tmp_path, tmp_path)
    cfg.checkpoint.exit_on_missing_checkpoint = True
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        check_run_directory(cfg)


def test_another_configs_run_is_refused_field_by_field(tmp_path):
    write_checkpoint(tmp_path, 10, make_config(tmp_path, tmp_path))
    cfg = make_config(tmp_path, tmp_path)
    cfg.model.hidden_size, cfg.rng.seed, cfg.optimizer.lr = 512, 7, 1.0
    with pytest.raises(CheckpointError) as caught:
        check_run_directory(cfg)
    assert "model.hidden_size = 512: the checkpoint was saved with 0" in str(caught.value)
    assert "rng.seed = 7: the checkpoint was saved with 1234" in str(caught.value)
    assert "optimizer.lr" not in str(caught.value)


def test_allowed_changes_are_reported(tmp_path):
    write_checkpoint(tmp_path, 10)
    cfg = make_config(tmp_path, tmp_path)
    cfg.optimizer.lr = 1.0
    cfg.model.tensor_model_parallel_size = 8
    assert check_run_directory(cfg).changes == ["optimizer.lr = 1.0: the checkpoint was saved with 0.0003."]


def test_another_tokenizer_is_refused_by_its_content(tmp_path):
    old = make_config(tmp_path, tmp_path)
    old.tokenizer.vocab_size = 100
    write_checkpoint(tmp_path, 10, old)
    new = make_config(tmp_path, tmp_path)
    new.tokenizer.tokenizer_type = "bytes"
    new.tokenizer.vocab_size = 100
    with pytest.raises(CheckpointError, match="is another tokenizer"):
        check_run_directory(new)


def write_dataset(prefix: Path, num_documents: int = 40) -> None:
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    for n in range(num_documents):
        writer.write(np.arange(n, n + 100), np.array([100]))
    writer.close()


def run_on_data(folder: Path) -> ConfigContainer:
    """A run that resumes from `folder`/run, and its data."""
    (folder / "data").mkdir(exist_ok=True)
    for name in ("a", "b"):
        write_dataset(folder / "data" / name)
    cfg = make_config(folder / "run", folder / "run")
    cfg.dataset.blend = [[str(folder / "data" / "a"), str(folder / "data" / "b")], None]
    return cfg


def test_data_prepared_again_is_refused_and_may_be_accepted(tmp_path):
    """The blend's names are the same, so the config alone does not show it."""
    write_checkpoint(tmp_path / "run", 10, run_on_data(tmp_path))
    cfg = run_on_data(tmp_path)
    assert check_run_directory(cfg).changes == []
    write_dataset(tmp_path / "data" / "b", num_documents=41)
    with pytest.raises(CheckpointError) as caught:
        check_run_directory(cfg)
    assert f"the files of {tmp_path / 'data' / 'b'} hold other data" in str(caught.value)
    assert "/data/a" not in str(caught.value)
    assert "checkpoint.exit_on_changed_data=false" in str(caught.value)
    cfg.checkpoint.exit_on_changed_data = False
    assert [text for text in check_run_directory(cfg).changes if "other data" in text]


def test_data_of_the_same_size_is_other_data_if_its_tokens_are(tmp_path):
    cfg = run_on_data(tmp_path)
    write_checkpoint(tmp_path / "run", 10, cfg)
    file = tmp_path / "data" / "a.bin"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="hold other data"):
        check_run_directory(cfg)


def test_data_in_another_folder_is_the_same(tmp_path):
    write_checkpoint(tmp_path / "run", 10, run_on_data(tmp_path))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    cfg = make_config(tmp_path / "run", tmp_path / "run")
    cfg.dataset.blend = [[str(tmp_path / "elsewhere" / name) for name in ("a", "b")], None]
    for file in (tmp_path / "elsewhere").iterdir():
        os.utime(file, (1, 1))
    assert check_run_directory(cfg).changes == []


def test_a_checkpoint_that_does_not_know_its_data_resumes(tmp_path):
    """Earlier releases did not record it."""
    cfg = run_on_data(tmp_path)
    whole = write_checkpoint(tmp_path / "run", 10, cfg)
    (whole / MANIFEST_NAME).write_bytes(replace(read_manifest(whole), data=[]).to_bytes())
    assert check_run_directory(cfg).changes == []


@pytest.mark.parametrize("save", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path, save):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not a directory"):
        check_run_directory(make_config(tmp_path / save))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_run_directory(make_config(tmp_path / "run"))


def test_a_place_where_even_root_cannot_write_is_named():
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_run_directory(make_config(Path("/proc/megatron_mtp_run")))


def test_checkpoints_that_end_with_the_process_are_warned_of(caplog):
    cfg = make_config(None)
    cfg.checkpoint.save = "memory://of-a-test/run"
    assert check_run_directory(cfg) is None
    assert "memory ends with this process, and the checkpoints with it" in caplog.text


def test_needs_no_torch():
    code = (
        "import sys, megatron_mtp.checkpoint.preflight\n"
        "assert not {'torch', 'megatron', 'megatron.core'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
