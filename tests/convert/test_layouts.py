"""Imported at one layout, saved by a run at another, exported: the files of the beginning."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from tests.convert.hf_models import make
from tests.convert.mtp_forms import add_depths
from tests.convert.test_families import EP2, PP2, TP2
from tests.harness.runs import opened

pytestmark = pytest.mark.dist

LAYOUTS = {"tp": TP2, "pp": PP2, "ep": EP2, "tp_ep": TP2 | EP2}
CASES = [
    ("deepseek_v3", "tp"),
    ("deepseek_v3", "pp"),
    ("deepseek_v3", "ep"),
    ("qwen3_moe", "tp_ep"),
    ("qwen3_next", "tp"),
    ("llama", "pp"),
]


def resave(source: str, target: str, changes: dict) -> None:
    """On each rank of a job: starts from the weights at the layout and saves a checkpoint before any step."""
    from megatron_mtp.convert.load import config_of
    from megatron_mtp.training.state import TrainState

    cfg = config_of(source)
    for name, value in changes.items():
        setattr(cfg.model, name, value)
    cfg.model.seq_length, cfg.dataset.seq_length, cfg.dataset.mock = 16, None, True
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 5, 4, 1
    cfg.scheduler.lr_warmup_iters = 0
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.dist.device = "cpu"
    cfg.checkpoint.pretrained_checkpoint, cfg.checkpoint.save = source, target
    cfg.finalize(2)
    with opened(cfg) as run:
        checkpointer = Checkpointer(cfg, run.groups)
        checkpointer.start_from_pretrained(run.engine.chunks, run.engine.optimizer)
        checkpointer.save(run.engine.chunks, run.engine.optimizer, TrainState())
        checkpointer.release()


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=() if case[0] == "deepseek_v3" else pytest.mark.slow) for case in CASES],
)
def test_saved_at_two_ranks_and_exported(name, layout, ranks, tmp_path):
    model = make(name, tmp_path / "hf")
    if name == "deepseek_v3":
        add_depths(model, tmp_path / "hf", "deepseek", 1, "num_nextn_predict_layers")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    ranks(2).run(resave, str(tmp_path / "imported"), str(tmp_path / "run"), LAYOUTS[layout])
    report = export_hf(tmp_path / "run", tmp_path / "back")
    first, back = (safetensors.torch.load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[tensor], back[tensor]) for tensor in first)
    assert any("optimizer state" in text for text in report.left_out)
    assert check_hf(tmp_path / "run", tmp_path / "hf").is_equal
