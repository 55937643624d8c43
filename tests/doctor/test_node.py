"""`doctor --node`: what one machine of a job is checked for."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_mtp.cli.main import main
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.units import GIB
from megatron_mtp.doctor import node
from megatron_mtp.doctor.node import NodeReport, examine_node, fail_if_unfit, speed_lines
from megatron_mtp.errors import ConfigError, NodeError
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


def make_config(folder: Path) -> ConfigContainer:
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "runs" / "a")
    cfg.dataset.blend = [str(folder / "web")]
    for end in ("bin", "idx"):
        (folder / f"web.{end}").touch()
    return cfg


def test_a_fit_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    report = examine_node(0, make_config(tmp_path).finalize())
    assert (report.faults, report.mistakes) == ([], [])
    assert any(fact.startswith("torch 2.") for fact in report.facts)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["web.bin", "web.idx"], "it leaves nothing behind"
    fail_if_unfit(report)


def test_missing_gpus_are_a_fault_of_the_node(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(NodeError, match=r"^node7: GPUs: torch sees 0, the job needs 8") as caught:
        fail_if_unfit(examine_node(8))
    assert caught.value.exit_code == 7


def test_a_broken_gpu_and_one_in_use_are_named(monkeypatch: pytest.MonkeyPatch):
    def copy(index: int) -> float:
        if index == 2:
            raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")
        return 3000.0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((40 if i == 1 else 79) * GIB, 80 * GIB))
    monkeypatch.setattr(node, "_copy_gb_per_s", copy)
    report = NodeReport()
    node._check_gpus(report, 4)
    assert [str(fault) for fault in report.faults] == [
        "GPU 1: another process holds 40.0 of its 80.0 GiB.",
        "GPU 2: CUDA error: uncorrectable ECC error.",
    ]
    assert report.facts == ["2 GPUs copy 3000 GB/s (median)"]


def test_a_slow_gpu_is_named():
    assert speed_lines({}) == []
    assert speed_lines({0: 3000, 1: 2900, 2: 1500}) == [
        "3 GPUs copy 2900 GB/s (median)",
        "slow GPU 2: copies 1500 GB/s",
    ]


def test_a_full_disk_is_a_fault_of_the_node(monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(GIB // 2))
    (fault,) = examine_node(0).faults
    assert "0.50 GiB are free; a node needs 1" in str(fault)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset.blend": ["F/none"]}, "dataset.blend = 'F/none': there is no F/none.bin here."),
        ({"dataset.loss_mask_suffix": "_mask"}, "there is no F/web_mask.bin here."),
        (
            {"tokenizer.tokenizer_model": "F/t.json"},
            "tokenizer_model = 'F/t.json': there is no F/t.json here.",
        ),
        ({"logger.tensorboard_dir": "F/web.bin/tb"}, "logger.tensorboard_dir = 'F/web.bin/tb': F/web.bin cannot be"),
    ],
)
def test_paths_that_are_missing_are_mistakes(tmp_path: Path, change: dict, said: str):
    cfg = make_config(tmp_path)
    for name, value in change.items():
        section, _, field = name.partition(".")
        text = [item.replace("F", str(tmp_path)) for item in value] if isinstance(value, list) else value
        setattr(getattr(cfg, section), field, text.replace("F", str(tmp_path)) if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        fail_if_unfit(examine_node(0, cfg.finalize()))
    assert said.replace("F", str(tmp_path)) in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_checkpoint_must_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = make_config(tmp_path).finalize()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(8 * GIB))
    monkeypatch.setattr(node, "checkpoint_bytes", lambda cfg: 8 * GIB)
    assert examine_node(0, cfg).mistakes == []
    monkeypatch.setattr(node, "checkpoint_bytes", lambda cfg: 9 * GIB)
    (problem,) = examine_node(0, cfg).mistakes
    assert "8.0 GiB are free there, and one checkpoint takes 9.0" in str(problem)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for arguments, code, said in (
        (["--node", "tiny_dense"], 0, ""),
        (["--node", "--gpus", "2"], 7, "GPUs: torch sees 1, the job needs 2"),
        (["--node", "tiny_dense", "dataset.blend=[/none/web]"], 2, "there is no /none/web.bin here"),
        (["tiny_dense"], 2, "only with --node"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["doctor", *arguments])
        assert int(left.value.code or 0) == code
        assert said in capsys.readouterr().err
