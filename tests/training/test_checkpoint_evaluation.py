"""`megatron-mtp evaluate`: the numbers of the run's own evaluation, at other layouts and on other data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import pretrain
from megatron_mtp.cli.main import main
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.observe.jsonl import read_metrics
from tests.harness.s3 import Bucket
from tests.training.test_pretrain import tiny, write_dataset

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data of its own with a second validation set, evaluated and saved at iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name in ("train", "held_out", "code"):
        write_dataset(folder / name, 512)
    cfg = tiny(folder, train_iters=4)
    cfg.dataset.update(mock=False, split=None)
    cfg.dataset.blend_per_split = [[str(folder / "train")], [str(folder / "held_out")], None]
    cfg.dataset.valid_sets = {"code": [str(folder / "code")]}
    cfg.checkpoint.update(save=str(folder / "run"), save_interval=2)
    cfg.validation.update(eval_interval=2, eval_iters=2)
    pretrain(cfg)
    return folder / "run"


def logged(run: Path, name: str, iteration: int) -> dict[str, Any]:
    lines = read_metrics(run.parent / "metrics.jsonl", "evaluation", name)
    return next(line for line in lines if line["iteration"] == iteration)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    return printed(capsys, *arguments)["sets"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *map(str, arguments), "dist.device=cpu", "--json"])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    return json.loads(shown.out)


def assert_equal(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    names = [name for name in expected if name.endswith(" loss")]
    assert len(names) == 3
    assert found["losses"] == {name: pytest.approx(expected[name], rel=rel) for name in names}
    assert found["acceptance"]["mtp_1/top1_target"] == pytest.approx(expected["mtp_1/top1_target"], rel=1e-6)


def test_it_equals_the_evaluations_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]):
    for iteration in (2, 4):
        data = printed(capsys, f"{run}@{iteration}")
        found = data["sets"]
        assert data["iteration"] == iteration
        assert data["layout"] == {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1}
        assert {result["samples"] for result in found.values()} == {2 * data["batch_size"]}
        assert set(found) == {"validation", "code"}
        for name, result in found.items():
            assert_equal(result, logged(run, name, iteration), rel=0)


@pytest.mark.parametrize(
    "layout",
    [
        ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        pytest.param(["model.pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow, id="dp2"),
    ],
    ids=" ".join,
)
def test_it_is_the_same_at_other_layouts(run: Path, layout: list[str]):
    command = [sys.executable, "-m", "megatron_mtp", "evaluate", run, "--nproc", "2", "--json", "dist.device=cpu"]
    done = subprocess.run([*command, *layout], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    for name, result in json.loads(done.stdout)["sets"].items():
        assert_equal(result, logged(run, name, 4), rel=1e-6)


def test_other_data_by_name_without_that_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The run's own files may be gone."""
    write_dataset(tmp_path / "code", 512)
    before = {path: path.rename(path.with_suffix(".away")) for path in run.parent.glob("*.bin")}
    try:
        found = evaluated(capsys, run, "--set", f"code={tmp_path}/code")
    finally:
        for path, away in before.items():
            away.rename(path)
    assert set(found) == {"code"}
    assert_equal(found["code"], logged(run, "code", 4), rel=0)


def test_other_data_in_object_storage(run: Path, tmp_path: Path, s3: Bucket, capsys: pytest.CaptureFixture[str]):
    for path in run.parent.glob("code.*"):
        (s3.place("corpus") / path.name).write_bytes(path.read_bytes())
    cache = f"dataset.object_storage_cache_path={tmp_path / 'cache'}"
    found = evaluated(capsys, run, "--set", f"code={s3.address('corpus/code')}", cache)
    assert_equal(found["code"], logged(run, "code", 4), rel=0)


def test_once_through_each_set_at_two_batch_sizes(run: Path, capsys: pytest.CaptureFixture[str]):
    sizes = [f"validation.eval_{kind}_batch_size" for kind in ("micro", "global")]
    first, second = (
        evaluated(capsys, run, "validation.eval_iters=-1", f"{sizes[0]}={micro}", f"{sizes[1]}={size}")
        for micro, size in ((1, 1), (4, 8))
    )
    for name in ("validation", "code"):
        assert first[name]["targets"] == second[name]["targets"]
        assert first[name]["samples"] == second[name]["samples"] == first[name]["targets"]["lm loss"] // 64
        assert first[name]["losses"] == pytest.approx(second[name]["losses"], rel=1e-6)


def test_a_hugging_face_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export_hf(run, tmp_path / "hf")
    options = ["validation.eval_iters=2", "train.global_batch_size=8", "train.micro_batch_size=2"]
    code = run.parent / "code"
    data = printed(capsys, tmp_path / "hf", "--set", f"code={code}", *options, "model.seq_length=64")
    found = data["sets"]
    assert (data["iteration"], data["batch_size"], found["code"]["samples"]) == (None, 8, 16)
    assert_equal(found["code"], logged(run, "code", 4), rel=1e-6)


def test_the_table_fits_a_terminal(run: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "dist.device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("iteration 4; TP 1, PP 1, CP 1, EP 1, DP 1; batches of ")
    assert any(line.split()[0] == "code" and line.endswith(" samples read") for line in lines)
    assert any(
        line.split()[:4] == ["code", "mtp_2", "loss", f"{logged(run, 'code', 4)['mtp_2 loss']:.6f}"] for line in lines
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "code"], "--set code: must be NAME=PREFIX"),
        (["--set", "a=x", "--set", "a=y"], "--set a=y: the name is given twice"),
        (["validation.eval_iters=0"], "nothing would be evaluated"),
        (["--set", "code=nowhere/data"], "--set code=nowhere/data: nowhere/data.idx is missing"),
        (["model.tensor_model_parallel_size=2"], "world_size = 1: must be a multiple of 2"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run), *arguments, "dist.device=cpu"])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert message in shown.err
    assert shown.out == ""
