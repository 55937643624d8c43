"""The rows of a run: milestones at the steps where the schedules change, sizes, planned memory."""

from __future__ import annotations

import pytest

from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.parallel.card import WIDTH, milestones, render, run_rows
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
from megatron_mtp.parallel.resolve import ResolvedRun, resolve
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit


def resolved(recipe: str, *overrides: str, world_size: int | None = None) -> ResolvedRun:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, list(overrides))
    return resolve(cfg.finalize(world_size), world_size)


def steps(run: ResolvedRun) -> dict[str, int]:
    return {milestone.what: milestone.step for milestone in milestones(run)}


def test_milestones_are_where_the_schedules_change():
    run = resolved(
        "tiny_dense", "train.train_iters=100", "train.global_batch_size=8", "scheduler.lr_warmup_iters=10",
        "scheduler.lr_decay_style=WSD", "scheduler.lr_decay_iters=90", "scheduler.lr_wsd_decay_iters=20",
        "optimizer.lr=0.01", "optimizer.min_lr=0.001", "model.mtp_loss_scaling_factor=0.3@0,0.1@20480",
    )  # fmt: skip
    found = steps(run)
    assert found["warmup ends at 0.01"] == 10
    assert found["decay starts (WSD, minus_sqrt)"] == 70
    assert found["decay ends at 0.001"] == 90
    assert found["the loss factor becomes 0.1"] == 20480 // 64 // 8
    assert found["the run ends: 800 samples, 51.2K tokens"] == 100
    rates = [run.learning_rate(8 * step) for step in (10, 70, 71, 90)]
    assert rates == [pytest.approx(0.01), pytest.approx(0.01), rates[2], pytest.approx(0.001)]
    assert 0.001 < rates[2] < 0.01
    assert [run.loss_factor.at(64 * 8 * step) for step in (39, 40)] == [0.3, 0.1]


def test_a_ramp_ends_where_the_batch_is_full():
    run = resolved("tiny_dense", "train.train_iters=100", "train.global_batch_size=8",
                   "train.rampup_batch_size=[2,2,120]", "train.micro_batch_size=1")  # fmt: skip
    step = steps(run)["the global batch has grown to 8"]
    batch = BatchSchedule.of(run.cfg.train)
    sizes = [batch.size_at(batch.consumed_after(number)) for number in (step - 1, step)]
    assert sizes == [6, 8]
    assert next(iter(steps(run))).endswith("global batch 2")


def test_what_lies_beyond_the_end_is_marked():
    texts = [milestone.text for milestone in milestones(resolved("tiny_dense", "train.train_iters=5"))]
    beyond = [text for text in texts if "after the end" in text]
    assert beyond
    assert all("warmup" in text or "decay" in text for text in beyond)


def test_a_run_without_a_length_ends_by_time():
    run = resolved("tiny_dense", "train.train_iters=null", "train.exit_duration_in_mins=90",
                   "scheduler.lr_decay_style=constant")  # fmt: skip
    assert ("schedule", "the run ends after 90 minutes") in run_rows(run)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_every_recipe_fit_a_terminal(recipe: str):
    run = resolved(recipe)
    lines = render(run_rows(run, is_size_open=True)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert labels == [label for label in "model MTP parallel stages batch schedule memory".split() if label in labels]
    assert {"model", "parallel", "schedule"} <= set(labels)
    assert f"a multiple of {run.world_size} processes" in render(run_rows(run, is_size_open=True))


def test_sizes_and_memory_are_those_of_the_planner():
    run = resolved("tiny_moe", "model.pipeline_model_parallel_size=2", world_size=4)
    text = render(run_rows(run))
    count = count_parameters(run.cfg.model)
    assert f"{count.mtp / count.total:.1%}" in text
    assert "active for a token" in text
    peak = MemoryModel(run).fullest_bytes(run.layout)
    assert f"{peak / 2**20:.3g} MiB planned for each rank on stage" in text
    assert "dp 2; 4 processes; layout planned for" in text
