"""A run says at its start what it trains, on which data, and to which end; so do its records."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest

from megatron_mtp import pretrain
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.parallel.card import WIDTH
from tests.observe.wandb_file import read_history
from tests.training.test_validation_sets import config

pytestmark = pytest.mark.dist


def test_the_card_is_printed_and_in_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = config(tmp_path)
    cfg.train.update(train_iters=2)
    cfg.dataset.blend_per_split[0] = [[str(tmp_path / "train"), str(tmp_path / "code")], [0.75, 0.25]]
    cfg.logger.update(tensorboard_dir=str(tmp_path / "tb"), wandb_project="test", wandb_exp_name="card")
    cfg.logger.update(wandb_mode="offline", wandb_save_dir=str(tmp_path))
    state = pretrain(cfg, recipe="tiny").state
    (card,) = [line["text"] for line in read_metrics(tmp_path / "metrics.jsonl", "start card")]
    assert card in capsys.readouterr().out
    assert max(map(len, card.splitlines())) <= WIDTH
    lines = card.splitlines()
    assert lines[0].split() == ["run", "tiny", "on", "1", "x", "cpu"]
    train, code = (next(line for line in lines if f"{name} " in line and "%" in line) for name in ("/train", "/code"))
    assert (train.split()[-4], train.split()[-2], code.split()[-2]) == ("8", "75.0%", "25.0%")
    assert "every 2 steps and at the end, 1 batches of 4 samples from each set" in card
    assert any(line.strip().startswith("docs: ") and "one evaluation reads" in line for line in lines)
    assert "the run ends: 8 samples, 256 tokens" in card
    events = b"".join(path.read_bytes() for path in (tmp_path / "tb").iterdir())
    assert card.encode() in events
    (row,) = (row for row in read_history(tmp_path, state.wandb_run_id) if "text/start card/path" in row)
    (html,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['text/start card/path']}")
    assert escape(card) in html.read_text()


def test_epochs_at_the_end_follow_from_the_length(tmp_path: Path):
    cfg = config(tmp_path)
    cfg.train.update(train_iters=3)
    cfg.validation.update(eval_iters=0, eval_interval=None)
    reader = IndexedReader(str(tmp_path / "train"))
    samples = (reader.count_tokens(0, len(reader)) - 1) // 32
    pretrain(cfg)
    card = read_metrics(tmp_path / "metrics.jsonl", "start card")[0]["text"]
    assert f"{3 * 4 / samples:.2f}" in next(line for line in card.splitlines() if "/train" in line).split()
    assert "none: the run has no validation set" in card
