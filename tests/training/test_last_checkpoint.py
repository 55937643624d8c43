"""A run whose last checkpoint cannot be saved says so, tries again, and does not end as if it were."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.errors import NotSavedError
from megatron_mtp.training import loop
from tests.training.guards.test_preemption import SendSignal, saved, saving

pytestmark = pytest.mark.dist


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Iteration -> how many more saves of it fail."""
    left: dict[int, int] = {}
    complete = RunDirectory.complete

    def refuse(self, manifest):
        if left.get(manifest.iteration, 0):
            left[manifest.iteration] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return complete(self, manifest)

    monkeypatch.setattr(RunDirectory, "complete", refuse)
    monkeypatch.setattr(loop, "RETRY_S", (0.01, 0.02))
    return left


@pytest.mark.parametrize("is_async", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_last_checkpoint_is_tried_three_times(
    tmp_path: Path, full_disk: dict[int, int], is_async: bool, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    cfg = saving(tmp_path, train_iters=4)
    cfg.checkpoint.save_interval, cfg.checkpoint.async_save = 2, is_async
    full_disk |= {4: 2}
    assert pretrain(cfg).exit_code == 0
    assert set(saved(tmp_path)) == {2, 4}
    assert full_disk == {4: 0}
    lines = [record.message for record in caplog.records if record.message.startswith("saved ")]
    assert [line.partition(" in ")[0] for line in lines] == [
        f"saved {tmp_path}/checkpoints/iter_0000002 (interval)",
        f"saved {tmp_path}/checkpoints/iter_0000004 (end of training)",
    ]


@pytest.mark.parametrize("is_async", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_loses_its_end_does_not_end_with_0(
    tmp_path: Path, full_disk: dict[int, int], is_async: bool, caplog: pytest.LogCaptureFixture
):
    cfg = saving(tmp_path, train_iters=4)
    cfg.checkpoint.save_interval, cfg.checkpoint.async_save = 2, is_async
    full_disk |= {4: 9}
    with pytest.raises(
        NotSavedError, match="Iterations 3 to 4 are lost: the newest checkpoint is iteration 2"
    ) as caught:
        pretrain(cfg)
    assert caught.value.exit_code == 6
    assert full_disk == {4: 6}
    reasons = [record.message for record in caplog.records if "was not saved" in record.message]
    assert len(reasons) == 3
    assert all("No space left on device" in reason for reason in reasons)
    full_disk.clear()
    assert pretrain(cfg).exit_code == 0
    assert set(saved(tmp_path)) == {2, 4}


def test_sigterm_without_a_checkpoint_is_no_preemption(tmp_path: Path, full_disk: dict[int, int]):
    full_disk |= {3: 9}
    with pytest.raises(NotSavedError, match=r"after iteration 3 \(SIGTERM\).*Iterations 1 to 3 .* no checkpoint"):
        pretrain(saving(tmp_path, train_iters=8), callbacks=[SendSignal(signal.SIGTERM, 3)])
