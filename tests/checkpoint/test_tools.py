"""RUN@200 and RUN@best, and the commands that list, average, strip and remove checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mtp import pretrain
from megatron_mtp.checkpoint.directory import LOCK_NAME, RunDirectory, checkpoint_folder
from megatron_mtp.checkpoint.merging import average, strip
from megatron_mtp.checkpoint.removing import remove
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.cli.main import main
from megatron_mtp.data.lock import Lock
from megatron_mtp.errors import CheckpointError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.storage.place import Place
from tests.checkpoint.conftest import STORES, copy_run
from tests.harness.s3 import Bucket
from tests.training.test_pretrain import tiny

pytestmark = pytest.mark.dist


def train(folder: Path, save: Path, load: str | Path, name: str = "tiny_dense", **train: int):
    cfg = tiny(folder, name, train_iters=6, **train)
    cfg.checkpoint.update(save=str(save), load=str(load), save_interval=2)
    cfg.validation.update(eval_interval=2, eval_iters=1)
    return pretrain(cfg)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 2, 4 and 6, each with the loss of an evaluation."""
    folder = tmp_path_factory.mktemp("tools")
    train(folder, folder / "run", folder / "run")
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(params=STORES)
def anywhere(run: Path, request: pytest.FixtureRequest) -> Place:
    """The same, on files and on the S3 server."""
    if request.param == "files":
        return copy_run(run, request.getfixturevalue("tmp_path") / "run")
    return copy_run(run, request.getfixturevalue("s3").place("runs/run"))


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", *map(str, arguments)])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    return shown.out


def test_names_mean_what_the_log_says(run: Path):
    losses = {line["iteration"]: line["lm loss"] for line in read_metrics(run.parent / "metrics.jsonl", "evaluation")}
    best = min(losses, key=losses.__getitem__)
    for name, iteration in (("2", 2), ("4", 4), ("latest", 6), ("best", best)):
        assert checkpoint_folder(f"{run}@{name}") == run / f"iter_{iteration:07d}"
    assert checkpoint_folder(run) == run / "iter_0000006"


@pytest.mark.parametrize(
    ("name", "message"),
    [("3", "there is no such checkpoint. Iterations there: 6, 4, 2"), ("first", "holds no checkpoint")],
)
def test_a_name_that_means_nothing_is_refused(run: Path, name: str, message: str):
    with pytest.raises(CheckpointError, match=message):
        checkpoint_folder(f"{run}@{name}")


def test_a_named_checkpoint_that_is_damaged_is_not_replaced_by_another(copy: Path):
    (copy / "iter_0000004/config.yaml").write_text("model: {}\n")
    with pytest.raises(CheckpointError, match="iter_0000004: the checkpoint is damaged"):
        checkpoint_folder(f"{copy}@4")
    assert checkpoint_folder(f"{copy}@2") == copy / "iter_0000002"


def test_the_best_of_checkpoints_without_an_evaluation_is_refused(run: Path, tmp_path: Path):
    strip(f"{run}@4", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"@best: no checkpoint there was saved with a validation loss"):
        checkpoint_folder(f"{tmp_path}/out@best")


@pytest.mark.parametrize("name", ["run@2", "run/iter_0000002"])
def test_a_run_goes_on_from_an_older_checkpoint_into_another_directory(run: Path, tmp_path: Path, name: str):
    train(tmp_path, tmp_path / "branch", run.parent / name)
    expected, found = (
        {line["iteration"]: line["lm loss"] for line in read_metrics(folder / "metrics.jsonl")}
        for folder in (run.parent, tmp_path)
    )
    assert found == {iteration: loss for iteration, loss in expected.items() if iteration > 2}
    assert RunDirectory(tmp_path / "branch").iterations() == [6, 4]


def test_older_and_newer_checkpoints_of_two_runs_do_not_mix(copy: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds newer checkpoints, up to iteration 6"):
        train(tmp_path, copy, copy / "iter_0000004")
    remove([f"{copy}@latest"])
    train(tmp_path, copy, f"{copy}@4")
    assert RunDirectory(copy).iterations() == [6, 4, 2]


def test_an_average_is_the_mean_to_the_last_bit(run: Path, tmp_path: Path):
    merged = average([f"{run}@2", f"{run}@4", f"{run}@6"], tmp_path / "mean")
    parts = [StoredWeights(run / f"iter_{iteration:07d}") for iteration in (2, 4, 6)]
    found = StoredWeights(tmp_path / "mean")
    assert set(found.tensors) == set(parts[0].tensors)
    assert len(found.tensors) == merged.tensors
    for key in found.tensors:
        mean = torch.stack([part.whole(key).double() for part in parts]).sum(0).div(3).float()
        assert torch.equal(found.whole(key), mean), key
    two = average([f"{run}@2", f"{run}@4"], tmp_path / "two")
    for key in found.tensors:
        assert torch.equal(StoredWeights(two.folder).whole(key), (parts[0].whole(key) + parts[1].whole(key)) / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--last", "4"], "holds fewer than 4 checkpoints. Iterations there: 2, 4, 6."),
        (["{run}@2", "--last", "2"], "--last 2: needs one run directory, and 2 checkpoints are named."),
        (["--last", "1"], "greater than or equal to 2"),
    ],
)
def test_a_last_that_cannot_be(run: Path, tmp_path: Path, arguments: list[str], said: str, capsys):
    given = [argument.format(run=run) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "average", str(run), *given, "-o", str(tmp_path / "mean")])
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_run_starts_from_an_average(run: Path, tmp_path: Path):
    average([f"{run}@4", f"{run}@6"], tmp_path / "mean")
    cfg = tiny(tmp_path, train_iters=1)
    cfg.checkpoint.pretrained_checkpoint = f"{tmp_path}/mean@latest"
    cfg.validation.eval_iters = 0
    pretrain(cfg)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    first = read_metrics(run.parent / "metrics.jsonl")[0]
    assert step["lm loss"] < first["lm loss"] - 0.1


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(run: Path, copy: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="at least two"):
        average([f"{run}@2"], tmp_path / "mean")
    with pytest.raises(CheckpointError, match="given more than once"):
        average([f"{run}@6", f"{run}@latest"], tmp_path / "mean")
    train(tmp_path / "other", tmp_path / "other/run", tmp_path / "other/run", "tiny_llama")
    with pytest.raises(CheckpointError, match=r"(?s)another model.*model\."):
        average([f"{run}@6", tmp_path / "other/run"], tmp_path / "mean")
    shard = next((copy / "iter_0000004").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="checksum does not match"):
        average([f"{copy}@2", f"{copy}@4"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_failure_at_the_end_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (copy / "hf").mkdir()
    (copy / "hf/tokenizer.json").write_text("{}")

    def full(self, manifest):
        assert (tmp_path / "out/hf/tokenizer.json").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "complete", full)
    with pytest.raises(CheckpointError, match="No space left"):
        strip(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stripped_checkpoint_has_the_weights_and_counters_and_nothing_else(run: Path, tmp_path: Path):
    merged = strip(f"{run}@4", tmp_path / "small")
    before, after = StoredWeights(run / "iter_0000004"), StoredWeights(merged.folder)
    assert merged.folder == tmp_path / "small/iter_0000004"
    assert set(merged.left_out) == {"optimizer state", "random state", "Megatron-Core's common state"}
    assert set(after.left_out) == {"Megatron-Core's common state"}
    assert all(torch.equal(before.whole(key), after.whole(key)) for key in before.tensors)
    states = [json.loads((one.folder / "train_state.json").read_text())["train"] for one in (before, after)]
    assert states[0] == states[1]


def test_checkpoints_are_removed_under_the_lock_and_one_is_left(copy: Path):
    with pytest.raises(CheckpointError, match="no complete checkpoint would be left"):
        remove([f"{copy}@{iteration}" for iteration in (2, 4, 6)])
    with pytest.raises(CheckpointError, match="name an iteration"):
        remove([copy])
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        remove([f"{copy}@2", f"{copy}@3"])
    lock = Lock(copy / LOCK_NAME, "the run")
    list(lock.take(0))
    another = [sys.executable, "-m", "megatron_mtp", "checkpoint", "rm", f"{copy}@2"]
    done = subprocess.run(another, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2
    assert f"{copy}: is in use by process {os.getpid()}" in done.stderr
    assert RunDirectory(copy).iterations() == [6, 4, 2]
    lock.release()
    assert remove([f"{copy}@2", f"{copy}@4"]) == [copy / "iter_0000002", copy / "iter_0000004"]
    assert sorted(path.name for path in copy.glob("iter*")) == ["iter_0000006"]
    remove([f"{copy}@6"], force=True)
    assert RunDirectory(copy).iterations() == []


def test_the_commands(anywhere: Place, capsys: pytest.CaptureFixture[str]):
    copy = anywhere
    text = command(capsys, "list", copy)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["2", "4", "6"]
    assert text.count("*") == 2  # the best one, and what the mark means
    assert max(map(len, text.splitlines())) <= 80
    rows = json.loads(command(capsys, "list", copy, "--json"))
    assert [row["iteration"] for row in rows] == [2, 4, 6]
    shown = json.loads(command(capsys, "show", f"{copy}@4", "--json"))
    stored = StoredWeights(copy / "iter_0000004")
    assert sum(count["tensors"] for count in shown["weights"].values()) == len(stored.tensors)
    assert shown["weights"]["mtp"]["tensors"] > 0
    assert "iteration   4" in command(capsys, "show", f"{copy}@4")
    assert command(capsys, "verify", copy).count("intact") == 3
    made = json.loads(command(capsys, "average", f"{copy}@2", f"{copy}@4", "-o", copy.parent / "mean", "--json"))
    assert made["folder"] == str(copy.parent / "mean" / "iter_0000000")
    command(capsys, "average", copy, "--last", "2", "-o", copy.parent / "last")
    last, both = StoredWeights(copy.parent / "last"), [StoredWeights(copy / f"iter_000000{n}") for n in (4, 6)]
    assert last.manifest.reason == "average of run@4, run@6"
    for key in last.tensors:
        assert torch.equal(last.whole(key), (both[0].whole(key) + both[1].whole(key)) / 2)
    assert "left out: optimizer state" in command(capsys, "strip", copy, "-o", copy.parent / "small")
    assert command(capsys, "rm", f"{copy}@4") == f"removed {copy}/iter_0000004\n"


def test_verify_names_every_damaged_file(anywhere: Place, capsys: pytest.CaptureFixture[str]):
    copy = anywhere
    shard = next(file for file in (copy / "iter_0000004").iterdir() if file.name.endswith(".distcp"))
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    (copy / "iter_0000002" / "manifest.json").unlink()
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "verify", str(copy)])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out.count("intact") == 1
    assert f"{shard}: its checksum does not match" in shown.err
    assert "iter_0000002/manifest.json: cannot be read" in shown.err
    assert "not complete" in command(capsys, "list", copy)


def test_a_complete_run_that_is_started_again_says_so(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path, copy, copy)
    assert "nothing is left to train. To go on raise train.train_iters" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.slow
def test_commands_that_read_weights_take_addresses(run: Path, s3: Bucket, tmp_path: Path, capsys):
    remote = copy_run(run, s3.place())
    results = []
    for number, name in enumerate((str(run), str(remote))):
        out = tmp_path / str(number)
        lines = []
        for arguments in (
            ["evaluate", f"{name}@4", "--json", "validation.eval_iters=1"],
            ["convert", "export", f"{name}@best", str(out)],
            ["convert", "to-megatron", name, str(tmp_path / f"mcore{number}"), "--spec", "local"],
            ["generate", name, "--prompt-ids", "1 2 3", "--max-new-tokens", "4"],
        ):
            with pytest.raises(SystemExit) as end:
                main(arguments)
            shown = capsys.readouterr()
            assert not end.value.code, (arguments, shown.err)
            lines.append(shown.out)
        weights = {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
        assert weights
        results.append((json.loads(lines[0])["sets"] if "sets" in lines[0] else lines[0], weights))
    assert results[0] == results[1]
