"""Runs whose data lies on an S3 server: the curve and the weights of a run on files, also after an outage."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp import ConfigContainer, pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.cli.main import main
from megatron_mtp.data import object_file
from megatron_mtp.errors import LostDataError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.storage import connection
from tests.harness.s3 import Bucket, Fault
from tests.training.test_lost_data import STEPS, AfterStep, on_files
from tests.training.test_pretrain import curve, write_dataset

pytestmark = pytest.mark.dist


def weights(folder: Path) -> dict[str, str]:
    """Checksums of the last checkpoint's tensors."""
    directory = RunDirectory(folder / "checkpoints")
    files = directory.read(max(directory.iterations())).files
    return {file.name: file.sha256 for file in files if "distcp" in file.name}


def many_documents(folder: Path) -> ConfigContainer:
    """A run that has not read all of its data after a few steps, nor for the fingerprint of the data."""
    folder.mkdir()
    cfg = on_files(folder)
    write_dataset(folder / "text", cfg.model.vocab_size, num_documents=1000)
    return cfg


def moved(cfg: ConfigContainer, s3: Bucket, cache: Path) -> ConfigContainer:
    """The run, with its data on the server alone."""
    [prefix] = cfg.dataset.blend
    for path in Path(prefix).parent.glob("text.*"):
        (s3.place("corpus") / path.name).write_bytes(path.read_bytes())
        path.unlink()
    cfg.dataset.update(blend=[s3.address("corpus/text")], object_storage_cache_path=str(cache))
    return cfg


@pytest.mark.slow  # three runs
def test_an_outage_is_survived(s3: Bucket, tmp_path: Path, monkeypatch):
    """The run saves and ends, and the same command goes on to the end of a run on files."""
    monkeypatch.setattr(object_file, "TOKEN_BLOCK", 256)
    monkeypatch.setattr(connection, "REQUEST_ATTEMPTS", 1)
    pretrain(many_documents(tmp_path / "files"))
    cfg = moved(many_documents(tmp_path / "s3"), s3, tmp_path / "cache")
    outage = AfterStep(3, lambda: s3.inject(Fault("GET", ".bin", status=503)))
    with pytest.raises(LostDataError, match=r"text, train sample \d+: s3://.*text\.bin: cannot be read any more"):
        pretrain(cfg, callbacks=[outage])
    assert 3 <= len(read_metrics(tmp_path / "s3" / "metrics.jsonl")) < STEPS
    s3.proxy.clear()
    assert pretrain(cfg).state.iteration == STEPS
    assert curve(tmp_path / "s3") == curve(tmp_path / "files")
    assert weights(tmp_path / "s3") == weights(tmp_path / "files")


def test_an_object_that_is_missing_is_named_before_the_run(s3: Bucket, tmp_path: Path, capsys):
    (tmp_path / "run").mkdir()
    cfg = moved(on_files(tmp_path / "run"), s3, tmp_path / "cache")
    (s3.place("corpus") / "text.bin").unlink()
    blend, cache = f"dataset.blend={cfg.dataset.blend}", f"dataset.object_storage_cache_path={tmp_path / 'cache'}"
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "tiny_dense", "dataset.mock=false", blend, cache, f"checkpoint.save={tmp_path / 'new'}"])
    assert end.value.code == 2
    assert f"{s3.address('corpus/text.bin')}: cannot be read (no such object)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow  # two runs of two processes
def test_two_ranks_train_as_on_files(s3: Bucket, tmp_path: Path):
    for name in ("files", "s3"):
        (tmp_path / name).mkdir()
        cfg = on_files(tmp_path / name)
        if name == "s3":
            moved(cfg, s3, tmp_path / "cache")
            s3.inject(Fault("GET", "corpus", status=503, times=3))
            s3.inject(Fault("GET", "corpus", cut_at=100, skip=1, times=3))
        command = [
            "pretrain", "tiny_dense", "--nproc", "2", "dataset.mock=false", f"dataset.blend={cfg.dataset.blend}",
            "dataset.split='9,1,0'", "validation.eval_iters=2", "validation.eval_interval=4", "dist.device=cpu",
            f"train.train_iters={STEPS}", f"logger.log_dir={tmp_path / name}",
            f"checkpoint.save={tmp_path / name / 'checkpoints'}",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*command, f"dataset.object_storage_cache_path={tmp_path / 'cache'}"])
        assert not end.value.code
    assert curve(tmp_path / "s3") == curve(tmp_path / "files")
    assert len(curve(tmp_path / "s3")) == STEPS
    assert weights(tmp_path / "s3") == weights(tmp_path / "files")
