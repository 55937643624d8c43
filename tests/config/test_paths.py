"""The files and folders that a config names, and whether this machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp.config.paths import RunPath, run_paths
from megatron_mtp.recipes import get_recipe
from tests.config.test_fields import PATHS

pytestmark = pytest.mark.unit
WRITTEN = {"checkpoint.save", "checkpoint.load", "logger.log_dir", "logger.tensorboard_dir", "logger.wandb_save_dir"}
WRITTEN |= {"dataset.path_to_cache", "dataset.object_storage_cache_path", "profiling.profile_dir"}
LISTS = {"blend": [0.3, "/x", "0.7", "/y"], "blend_per_split": [["/x"], None, [["/y"], [1.0]]]}
LISTS["valid_sets"] = {"a": ["/x"], "b": ["/y"]}


@pytest.mark.parametrize(("section", "name"), [pair for pair in PATHS if pair[1] != "loss_mask_suffix"])
def test_every_path_of_the_config_is_found(section: str, name: str):
    cfg = get_recipe("tiny_dense")
    cfg.validation.eval_iters = 1
    setattr(getattr(cfg, section), name, LISTS.get(name, "/x"))
    field = f"{section}.{name}"
    found = [path for path in run_paths(cfg) if path.field == field]
    assert [path.path for path in found] == (["/x", "/y"] if name in LISTS else ["/x"])
    assert {path.is_written for path in found} == {field in WRITTEN}


def test_an_address_is_missed_on_no_machine():
    cfg = get_recipe("tiny_dense")
    cfg.dataset.blend = [0.3, "s3://bucket/x", 0.7, "/y"]
    there, here = (path for path in run_paths(cfg) if path.field == "dataset.blend")
    assert (there.missing(), here.missing()) == ([], ["/y.bin", "/y.idx"])


def test_a_prefix_stands_for_its_files(tmp_path: Path):
    cfg = get_recipe("tiny_dense")
    cfg.dataset.update(blend=[str(tmp_path / "web")], loss_mask_suffix="_mask", valid_sets={"a": ["/x"]})
    cfg.validation.eval_iters = 0
    (path,) = run_paths(cfg)
    assert path.endings == (".bin", ".idx", "_mask.bin", "_mask.idx")
    (tmp_path / "web.bin").touch()
    assert path.missing() == [f"{tmp_path}/web{end}" for end in path.endings[1:]]
    assert path.missing("/none/web")[0] == "/none/web.bin"


def test_a_checkpoint_may_be_named_by_its_run(tmp_path: Path):
    for name, is_there in (("", True), ("@best", True), ("@200", True), ("@worst", False), ("/none@best", False)):
        path = RunPath("checkpoint.pretrained_checkpoint", f"{tmp_path}{name}")
        assert (path.missing() == []) == is_there
