"""A whole training as text."""

from __future__ import annotations

from megatron_mtp.config.units import GIB
from megatron_mtp.parallel.planner.planner import Plan
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.plan.compare import Plans
from megatron_mtp.plan.training import forecast

DEPTH_HEADER = "MTP_depths step_s against tokens/s GiB days cost".split()


def training_lines(plans: Plans) -> list[str]:
    """Time, cost and failures of the training."""
    training, budget = plans.training, plans.budget
    assert training is not None, "asked for only with a budget"
    assert budget is not None, "as above"
    first = (
        f"{budget.tokens:.4g} tokens: {training.steps:,} steps, {_days(training.days)}, "
        f"{training.device_hours:,.0f} device hours"
    )
    if training.megawatt_hours is not None:
        first += f", {training.megawatt_hours:,.0f} MWh at {budget.watts:g} W"
    if training.cost is not None:
        first += f", cost {training.cost:,.0f} at {budget.price:g} an hour"
    if training.save_interval is None:
        return [first, "no failures and no saves are counted; --mtbf-hours counts them"]
    assert training.days_range is not None, "there are failures"
    low, high = training.days_range
    return [
        first,
        f"{_days(training.ideal_days)} without failures; goodput {training.goodput:.1%} with about "
        f"{training.failures:,.0f} failures; 90 of 100 simulated trainings take {low:.1f} to {high:.1f} days",
        f"save every {training.save_interval:,} steps (Young {training.young_steps:,.0f}, Daly "
        f"{training.daly_steps:,.0f}) if a save takes {budget.save_s:g} s and a restart {budget.restart_s:g} s; "
        f"{training.spares} spare node{'s' * (training.spares != 1)} for nodes that are repaired within a day",
    ]


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def training_cells(plans: Plans, plan: Plan, shape: RunShape) -> dict[str, str]:
    """Days and cost of the training with another plan; empty without a budget."""
    if plans.budget is None:
        return {}
    training = forecast(plans.budget, plan, shape, plans.machine.node_size)
    return {
        "devices": str(shape.world_size),
        "days": f"{training.days:.1f}",
        "device_hours": f"{training.device_hours:,.0f}",
        "cost": "-" if training.cost is None else f"{training.cost:,.0f}",
    }


def depth_rows(plans: Plans) -> list[list[str]]:
    """One row for each number of MTP depths."""
    shape, rows = plans.planner.shape, []
    configured = next((one.plan for one in plans.depths if one.depths == shape.depths.count), None)
    for one in plans.depths:
        if one.plan is None:
            rows.append([str(one.depths), "no split is legal and fits", *[""] * (len(DEPTH_HEADER) - 2)])
            continue
        step_ms = one.plan.step.total_ms
        cells = {
            "MTP_depths": str(one.depths),
            "step_s": f"{step_ms / 1e3:.3f}",
            "against": f"{step_ms / configured.step.total_ms - 1:+.1%}" if configured else "",
            "tokens/s": f"{one.plan.tokens_per_s:,.0f}",
            "GiB": f"{one.plan.peak_bytes / GIB:.1f}",
        } | training_cells(plans, one.plan, shape)
        rows.append([cells[name] for name in DEPTH_HEADER])
    return rows
