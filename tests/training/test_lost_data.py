"""Data that is truncated, deleted or unreadable in mid-run: the file is named, and the last step is saved."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.data import data_file
from megatron_mtp.errors import DataError, LostDataError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training.callbacks import Callback
from tests.harness.ranks import Ranks
from tests.training.guards.test_preemption import saved, saving
from tests.training.test_pretrain import curve, write_dataset

pytestmark = pytest.mark.dist
STEPS = 12


class AfterStep(Callback):
    """Calls `harm` after a step."""

    def __init__(self, step: int, harm: Callable[[], object]):
        self.step, self.harm = step, harm

    def on_step_end(self, run, state, result):
        if state.iteration == self.step:
            self.harm()


def on_files(folder: Path):
    """A run on a data set in files."""
    cfg = saving(folder, train_iters=STEPS)
    write_dataset(folder / "text", cfg.model.vocab_size)
    cfg.dataset.mock, cfg.dataset.blend, cfg.dataset.split = False, [str(folder / "text")], "1,0,0"
    return cfg


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain(on_files(folder))
    return curve(folder)


def files(folder: Path) -> dict[str, Path]:
    return {
        "bin": folder / "text.bin",
        "idx": folder / "text.idx",
        "cache": next((folder / "text_cache").glob("*.npy"), folder),
    }


@pytest.mark.parametrize(("which", "harm"), [("bin", "truncated"), ("bin", "deleted"), ("idx", "truncated")])
def test_a_run_that_loses_a_file_saves_and_names_it(tmp_path: Path, undisturbed, which: str, harm: str):
    cfg = on_files(tmp_path)
    path = files(tmp_path)[which]
    content = path.read_bytes()
    change = partial(os.truncate, path, len(content) // 3) if harm == "truncated" else path.unlink
    with pytest.raises(LostDataError, match=rf"text, train sample \d+: .*text\.{which}: was {harm} while") as caught:
        pretrain(cfg, callbacks=[AfterStep(3, change)])
    assert caught.value.exit_code == 2
    [(iteration, reason)] = saved(tmp_path).items()
    assert reason == "data cannot be read"
    assert iteration == len(read_metrics(tmp_path / "metrics.jsonl")) < STEPS
    with pytest.raises(DataError, match=rf"text\.{which}: (holds|cannot be read)"):
        pretrain(cfg)
    path.write_bytes(content)
    assert pretrain(cfg).state.iteration == STEPS
    assert curve(tmp_path) == undisturbed


def test_a_cached_index_that_is_truncated_is_named_too(tmp_path: Path):
    cfg = on_files(tmp_path)

    def truncate() -> None:
        os.truncate(files(tmp_path)["cache"], 200)

    with pytest.raises(LostDataError, match=r"text-train-\w+\.npy: was truncated .* Delete it, and it is built again"):
        pretrain(cfg, callbacks=[AfterStep(3, truncate)])
    files(tmp_path)["cache"].unlink()
    assert pretrain(cfg).state.iteration == STEPS


@pytest.mark.parametrize("failures", [2, 99])
def test_a_read_error_is_tried_again(tmp_path: Path, undisturbed, failures: int, monkeypatch, caplog):
    monkeypatch.setattr(data_file, "PAUSES_S", (0.01, 0.02, 0.03))
    read, left = os.pread, [0]

    def fail_at_times(*arguments):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(data_file.os, "pread", fail_at_times)
    cfg = on_files(tmp_path)
    harm = AfterStep(3, lambda: left.append(left.pop() + failures))
    if failures == 2:
        pretrain(cfg, callbacks=[harm])
        assert "Input/output error; it is read again" in caplog.text
    else:
        with pytest.raises(LostDataError, match=r"cannot be read any more .Input/output error, 4 attempts"):
            pretrain(cfg, callbacks=[harm])
        left[0] = 0
        assert list(saved(tmp_path)) == [len(read_metrics(tmp_path / "metrics.jsonl"))]
        pretrain(cfg)
    assert curve(tmp_path) == undisturbed


def lose_on_one_rank(lost: int) -> str:
    import torch
    import torch.distributed as dist

    from megatron_mtp.data.prefetch import Prefetcher
    from megatron_mtp.training.guards.data_errors import agreed

    def batches():
        yield "batch 0"
        if dist.get_rank() == lost:
            raise DataError("a.bin is gone")
        yield "batch 1"

    stream, seen = Prefetcher(batches(), 2), []
    try:
        seen += (batch for batch, _ in agreed(stream, torch.device("cpu")))
    except LostDataError as error:
        return f"{seen} {error} {stream.closed}"
    return "nothing was lost"


def test_every_rank_hears_of_it_before_the_same_batch(ranks: Ranks):
    assert ranks(2).run(lose_on_one_rank, 1) == ["['batch 0'] a.bin is gone True"] * 2
    assert ranks(2).run(lose_on_one_rank, 5) == ["nothing was lost"] * 2


@pytest.mark.slow  # two processes, started twice
@pytest.mark.timeout(300)
def test_two_ranks_end_with_one_message_and_the_last_step_saved(tmp_path: Path):
    cfg = on_files(tmp_path)
    cfg.train.train_iters = 5000
    cfg.to_yaml(tmp_path / "run.yaml")
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", "--config", str(tmp_path / "run.yaml")]
    with subprocess.Popen(
        [*command, "--nproc", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").is_file() or len(read_metrics(tmp_path / "metrics.jsonl")) < 5:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.truncate(tmp_path / "text.bin", 1000)
        _, text = run.communicate(timeout=120)
    assert run.returncode == 2, text
    assert text.count("\nmegatron-mtp: ") == 1
    assert 1 <= text.count("text.bin: was truncated while it was in use") <= 2  # each rank read another sample
    assert list(saved(tmp_path)) == [read_metrics(tmp_path / "metrics.jsonl")[-1]["iteration"]]
