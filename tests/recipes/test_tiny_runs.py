"""The tiny model of every family trains on one CPU: the loss of each depth falls on text whose next token follows from
the last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mtp import pretrain
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.dist
FAST = ("tiny_qwen3_next", "tiny_mimo")
VOCAB_SIZE = 97


def write_text(prefix: Path) -> None:
    """Documents that count on in sevens, modulo the vocabulary."""
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    for start in range(60):
        writer.write((start + 7 * np.arange(200)) % VOCAB_SIZE, np.array([200]))
    writer.close()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in RECIPES
        if name.startswith("tiny_")
    ],
)
def test_losses_fall(name: str, tmp_path: Path):
    write_text(tmp_path / "text")
    cfg = get_recipe(name)
    cfg.dataset.blend = [[str(tmp_path / "text")], None]
    cfg.dataset.mock = False
    cfg.dataset.split = "100,0,0"
    cfg.validation.eval_iters = 0
    cfg.model.vocab_size = VOCAB_SIZE
    cfg.train.train_iters = 30
    cfg.logger.log_dir = str(tmp_path / "logs")
    cfg.dist.device, cfg.dist.num_threads = "cpu", 1
    pretrain(cfg)
    steps = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    for depth in ["lm loss", *(f"mtp_{k} loss" for k in range(1, cfg.model.mtp_num_layers + 1))]:
        assert steps[0][depth] == pytest.approx(np.log(VOCAB_SIZE), rel=0.1)
        assert steps[-1][depth] < 0.6 * steps[0][depth], depth
