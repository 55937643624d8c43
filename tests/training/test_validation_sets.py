"""Validation sets keep their names in every record, and one of their losses chooses the best checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import ConfigContainer, pretrain
from megatron_mtp.checkpoint.directory import RunDirectory, checkpoint_folder
from megatron_mtp.cli.main import main
from megatron_mtp.observe.jsonl import read_metrics
from tests.harness.runs import opened
from tests.training.test_pretrain import tiny, write_dataset

pytestmark = pytest.mark.dist
SETS = ("docs", "code")


def config(folder: Path) -> ConfigContainer:
    """A run without a main validation set."""
    for name in ("train", *SETS):
        if not (folder / f"{name}.idx").exists():
            write_dataset(folder / name, 512, num_documents=8)
    cfg = tiny(folder, train_iters=6, global_batch_size=4, micro_batch_size=2)
    cfg.model.update(num_layers=2, hidden_size=32, ffn_hidden_size=64, seq_length=32)
    cfg.dataset.update(mock=False, split=None, blend_per_split=[[str(folder / "train")], None, None])
    cfg.dataset.valid_sets = {name: [str(folder / name)] for name in SETS}
    cfg.validation.update(eval_interval=2, eval_iters=1)
    return cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    cfg = config(folder)
    cfg.checkpoint.update(save=str(folder / "run"), most_recent_k=1, keep_best=1, best_metric="code/mtp_1 loss")
    pretrain(cfg)
    return folder / "run"


def logged(run: Path, name: str) -> dict[int, dict[str, Any]]:
    return {line["iteration"]: line for line in read_metrics(run.parent / "metrics.jsonl", "evaluation", name)}


def test_every_set_is_recorded_under_its_name(run: Path):
    lines = read_metrics(run.parent / "metrics.jsonl", "evaluation")
    assert [(line["iteration"], line["name"]) for line in lines] == [(i, name) for i in (2, 4, 6) for name in SETS]


def test_the_manifest_holds_all_losses_and_the_best_follows_the_chosen_one(run: Path, capsys):
    expected = {name: logged(run, name) for name in SETS}
    best = min((2, 4, 6), key=lambda iteration: expected["code"][iteration]["mtp_1 loss"])
    assert checkpoint_folder(f"{run}@best").name == f"iter_{best:07d}"
    manifest = RunDirectory(run).read(best)
    assert manifest.reason == "lowest code/mtp_1 loss"
    names = ("lm loss", "mtp_1 loss", "mtp_2 loss")
    assert manifest.validation_losses == {f"{s}/{name}": expected[s][best][name] for s in SETS for name in names}
    assert manifest.validation_loss == expected["docs"][best]["lm loss"]
    with pytest.raises(SystemExit):
        main(["checkpoint", "show", f"{run}@best"])
    out = capsys.readouterr().out
    assert all(f"{value:.4f}" in out for value in manifest.validation_losses.values())
    with pytest.raises(SystemExit):
        main(["checkpoint", "list", str(run)])
    out = capsys.readouterr().out
    assert f"{manifest.validation_losses['code/mtp_1 loss']:.4f}*" in out
    assert "code/mtp_1 loss at that iteration" in out
    assert f"{manifest.validation_losses['docs/mtp_2 loss']:.4f}" in out
    assert max(map(len, out.splitlines())) <= 80


def evaluated(cfg: ConfigContainer) -> tuple[list[float], list[int]]:
    """Sums and counts of every depth over the set "docs", read once, with weights that follow from the seed."""
    from megatron_mtp.device.process_group import job_size
    from megatron_mtp.training.evaluation import evaluate

    with opened(cfg.finalize(job_size())) as run:
        result = evaluate(run.engine, run.data, 0.1, ["docs"])["docs"]
    return result.depth_sums.tolist(), result.depth_counts.tolist()


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_once_through_a_set_is_exact(ranks, tmp_path: Path, size: int):
    """One sample at a time needs no fillers; the last batch of the others is filled, on one rank completely."""
    cfg = config(tmp_path)
    cfg.validation.update(eval_iters=-1, eval_micro_batch_size=1, eval_global_batch_size=1)
    [(sums, counts)] = ranks(1).run(evaluated, cfg)
    cfg.validation.update(eval_micro_batch_size=4, eval_global_batch_size=16)
    for found in ranks(size).run(evaluated, cfg):
        assert found == (pytest.approx(sums, rel=1e-6), counts)


def test_an_evaluation_that_goes_round_its_set_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = config(tmp_path)
    cfg.train.update(train_iters=1)
    cfg.validation.update(eval_iters=100)
    caplog.set_level(logging.INFO)
    pretrain(cfg)
    lines = [record.getMessage() for record in caplog.records if "one evaluation reads" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["validation set docs", "validation set code"]


def test_the_best_of_another_metric_is_forgotten(tmp_path: Path):
    """A resume that follows another loss keeps the first checkpoint that it evaluates."""
    cfg = config(tmp_path)
    run = tmp_path / "run"
    cfg.checkpoint.update(save=str(run), load=str(run), keep_best=1, most_recent_k=1)
    pretrain(cfg)
    cfg.train.train_iters = 8
    cfg.checkpoint.best_metric = "code/lm loss"
    assert pretrain(cfg).state.best_metric == "code/lm loss"
    state = json.loads((run / "iter_0000008/train_state.json").read_text())["train"]
    assert state["best_validation_loss"] == logged(run, "code")[8]["lm loss"]
