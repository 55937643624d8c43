"""`megatron-mtp plan --tokens`: a training to its last token."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_mtp.errors import PlanError
from megatron_mtp.plan.compare import make_plans
from megatron_mtp.plan.training import Budget, forecast, read_budget
from megatron_mtp.recipes import get_recipe
from tests.harness.plan_command import run as run

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def plans():
    return make_plans(get_recipe("qwen3_30b_a3b"), 8)


def test_days_hours_energy_and_cost_follow_from_the_step_time(plans):
    step_s, tokens = plans.chosen.step.total_ms / 1e3, plans.cfg.train.global_batch_size * plans.cfg.model.seq_length
    found = forecast(Budget(tokens=1000 * tokens - 1, price=2.5, watts=900), plans.chosen, plans.planner.shape, 8)
    assert found.steps == 1000
    assert found.days == found.ideal_days == pytest.approx(1000 * step_s / 86_400)
    assert found.device_hours == pytest.approx(8 * 1000 * step_s / 3600)
    assert found.megawatt_hours == pytest.approx(found.device_hours * 900 / 1e6)
    assert found.cost == pytest.approx(found.device_hours * 2.5)
    assert found.goodput == 1
    assert found.save_interval is found.spares is found.days_range is None


def test_failures_stretch_it_and_the_interval_is_the_best_number_of_steps(plans):
    shape, step_s = plans.planner.shape, plans.chosen.step.total_ms / 1e3
    found = forecast(Budget(tokens=10**12, mtbf_hours=100), plans.chosen, shape, 8)
    assert found.ideal_days < found.days_range[0] < found.days < found.days_range[1]
    assert found.goodput == pytest.approx(found.ideal_days / found.days)
    assert found.failures == pytest.approx(found.days * 24 * 8 / 100)
    assert found.save_interval * step_s == pytest.approx((2 * 30 * 100 * 3600 / 8) ** 0.5, rel=0.05)  # Young
    assert abs(found.save_interval - found.daly_steps) <= 1.01


def test_a_hundred_thousand_devices_are_forecast_in_seconds():
    before, cfg = time.process_time(), get_recipe("deepseek_v3")
    cfg.train.update(global_batch_size=32_000, rampup_batch_size=None)
    plans = make_plans(cfg, 102_400, memory_gib=0, budget=Budget(tokens=10**15, mtbf_hours=50_000, save_s=20))
    assert plans.training.failures > 100
    assert plans.training.spares > 50
    assert time.process_time() - before < 10


def test_the_command_says_it_and_what_each_depth_costs(run):
    arguments = ("llama3_8b", "--tokens", "15T", "--mtbf-hours", "50000", "--price", "2", "--watts", "1000")
    code, out, _ = run(*arguments)
    assert code == 0
    for words in ("1.5e+13 tokens", "device hours", "MWh at 1000 W", "cost", "goodput", "save every", "spare node"):
        assert words in out
    data = json.loads(run(*arguments, "--json")[1])
    assert data["training"]["cost"] == pytest.approx(2 * data["training"]["device_hours"])
    steps = [data["depths"][depths]["step_ms"] for depths in "012"]
    assert steps == sorted(steps)
    assert data["depths"]["1"]["step_ms"] == data["plan"]["step_ms"]


def test_a_search_says_what_each_candidate_costs_to_the_last_token(run):
    arguments = ("tiny_dense", "--search", "--devices", "2", "--top", "2", "--tokens", "1B", "--price", "3")
    code, out, _ = run(*arguments)
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("# "))
    assert header.split()[-5:] == ["days", "device", "hours", "cost", "layout"]


def test_numbers_of_devices_are_ranked_by_device_hours(run):
    numbers = ("--devices", "2", "--or-devices", "8", "--or-devices", "97")
    code, out, _ = run("tiny_dense", "--search", *numbers, "--tokens", "1B", "--top", "20", "--json")
    assert code == 0
    found = json.loads(out)["search"]
    hours = [one["devices"] * one["plan"]["step_ms"] for one in found]
    assert {one["devices"] for one in found} == {2, 8}  # 97 divides nothing
    assert hours == sorted(hours)


def test_without_tokens_the_report_is_as_it_was(run):
    assert "goodput" not in run("llama3_8b")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--price", "2"], "--price: is about a whole training"),
        (["--search", "--devices", "8", "--or-devices", "16"], "Add --search and --tokens"),
        (["--tokens", "many"], "--tokens = 'many': must be a whole number"),
        (["--tokens", "0"], "--tokens = '0': must be at least 1"),
        (["--tokens", "1T", "--mtbf-hours", "0"], "--mtbf-hours = 0.0: must be a finite number above 0"),
        (["--tokens", "1T", "--watts", "nan"], "--watts = nan: must be a finite number from 0 on"),
        (["--tokens", "1T", "--mtbf-hours", "0.1"], "no save is reached"),
    ],
)
def test_mistakes_are_named(run, arguments, words):
    code, _, err = run("llama3_8b", *arguments)
    assert code == 2
    assert words in " ".join(err.split())


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(PlanError) as caught:
        read_budget("0", price=-1.0, save_s=float("inf"))
    assert [problem.fields for problem in caught.value.problems] == [("--price",), ("--save-s",), ("--tokens",)]


def test_the_example_of_the_docs_is_what_the_command_prints(run):
    guide = (Path(__file__).parents[2] / "docs/planning.md").read_text(encoding="utf-8")
    command, printed = guide.split("## A whole training")[1].split("```")[1:4:2]
    (line,) = (line for line in command.splitlines() if line.startswith("megatron-mtp plan "))
    code, out, _ = run(*line.split()[2:])
    assert code == 0
    assert printed.strip() in out
