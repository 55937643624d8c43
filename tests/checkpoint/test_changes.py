"""What a resume says of a changed config: the learning rate of the next step, and fields without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.checkpoint.changes import free_changes, rate_change
from megatron_mtp.recipes import get_recipe
from tests.training.test_pretrain import tiny


def config(**optimizer: float):
    cfg = get_recipe("tiny_dense")
    cfg.train.update(train_iters=100, global_batch_size=8)
    cfg.scheduler.update(lr_warmup_iters=10, lr_decay_style="constant")
    cfg.optimizer.update(**{"lr": 2e-4, "min_lr": 0.0} | optimizer)
    return cfg


@pytest.mark.unit
def test_the_learning_rate_before_and_after():
    saved = config().finalize().to_dict()
    assert rate_change(saved, config().finalize(), 400) is None
    text = rate_change(saved, config(lr=2e-3).finalize(), 400)
    assert text == "the learning rate of the next step is 0.002; by the checkpoint's config it would be 0.0002"
    longer = config()
    longer.scheduler.lr_warmup_iters = 100
    assert "is 0.0001; by the checkpoint's config it would be 0.0002" in rate_change(saved, longer.finalize(), 400)
    assert rate_change(saved | {"newer": {}}, config(lr=2e-3).finalize(), 400) is None


@pytest.mark.unit
def test_free_fields_with_old_and_new_value():
    saved, present = config().finalize().to_dict(), config(lr=2e-3).finalize().to_dict()
    assert free_changes(saved, present) == []
    present["logger"]["log_interval"], present["train"]["callbacks"] = 7, ["a.py:B"]
    del saved["checkpoint"]["keep_best"]
    assert free_changes(saved, present) == ["train.callbacks [] -> ['a.py:B']", "logger.log_interval 1 -> 7"]


@pytest.mark.dist
def test_a_resume_says_what_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = tiny(tmp_path, train_iters=4, exit_interval=2)
    cfg.model.num_layers, cfg.validation.eval_iters = 2, 0
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    cfg.scheduler.update(lr_warmup_iters=0, lr_decay_style="constant")
    pretrain(cfg)
    cfg.train.exit_interval, cfg.optimizer.lr = None, 3e-2
    with caplog.at_level("INFO", logger="megatron_mtp"):
        pretrain(cfg)
    assert "the learning rate of the next step is 0.03; by the checkpoint's config it would be 0.003" in caplog.messages
    free = "changed since the checkpoint, without effect on the curve: train.exit_interval 2 -> None"
    assert free in caplog.messages
    assert any("optimizer.lr = 0.03: the checkpoint was saved with 0.003" in text for text in caplog.messages)
