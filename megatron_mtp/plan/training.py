"""A whole training: how long, how much, how often to save, and what each MTP depth costs. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from megatron_mtp.config.machines import Machine
from megatron_mtp.config.phase_configs import before_phases
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.errors import ConfigError, PlanError, Problem
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.auto_layout import is_planned
from megatron_mtp.parallel.planner.planner import Plan, Planner
from megatron_mtp.parallel.planner.search_sizes import Candidate
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.plan.failures import Failures, spare_nodes

HOUR_S, DAY_S = 3600.0, 86_400.0
MOST_DRAWS, MOST_RUNS = 200_000, 1000
"""Failures that a forecast draws in all, a fifth of a second, and trainings that it simulates."""
REPAIR_S = DAY_S
"""A broken node is back after a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a training is planned with.

    Args:
        tokens: to train on.
        mtbf_hours: mean time between failures of one device, with what fails with it; None: nothing fails.
        save_s: time that training stands still for one save.
        restart_s: from a failure to the first step after it.
        price: of one device for one hour.
        watts: of one device, with its share of node, network and cooling.
    """

    tokens: int
    mtbf_hours: float | None = None
    save_s: float = 30.0
    restart_s: float = 600.0
    price: float | None = None
    watts: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A training to its last token.

    Attributes:
        ideal_days: without failures and saves.
        days: expected.
        days_range: 5 and 95 of 100 simulated trainings are shorter; None: nothing fails.
        goodput: share of the time that ends up as progress.
        failures: expected number.
        save_interval: steps between saves of the shortest expected time; None: nothing fails.
        young_steps, daly_steps: the same by their formulas.
        spares: nodes to keep so that the job is complete 99 % of the time.
        cost: in the unit of the price, spare nodes not included.
    """

    steps: int
    ideal_days: float
    days: float
    days_range: tuple[float, float] | None
    goodput: float
    failures: float
    save_interval: int | None
    young_steps: float | None
    daly_steps: float | None
    spares: int | None
    device_hours: float
    megawatt_hours: float | None
    cost: float | None


def read_budget(tokens: str | None, **options: float | None) -> Budget | None:
    """A budget from a user's options; those that are None keep their defaults. Without tokens there is none.

    Raises:
        PlanError: a value is out of its range, or there are no tokens that it could be for.
    """
    problems = []
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if tokens is None:
        if given:
            names = tuple(f"--{name.replace('_', '-')}" for name in given)
            rule = "is about a whole training, and its tokens are not given"
            raise PlanError(Problem(fields=names, rule=rule, remedy="Add --tokens, such as --tokens 15T."))
        return None
    for name, value in given.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name == "mtbf_hours"):
            rule = "must be a finite number above 0" if name == "mtbf_hours" else "must be a finite number from 0 on"
            problems.append(Problem(fields=(f"--{name.replace('_', '-')}",), value=value, rule=rule))
    count = 0
    try:
        count = parse_quantity(tokens)
        if count < 1:
            problems.append(Problem(fields=("--tokens",), value=tokens, rule="must be at least 1"))
    except ConfigError as error:
        problems += [replace(problem, fields=("--tokens",)) for problem in error.problems]
    if problems:
        raise PlanError(problems)
    return Budget(tokens=count, **given)


def forecast(budget: Budget, plan: Plan, shape: RunShape, node_size: int) -> Forecast:
    """A training with the step time of a plan.

    Raises:
        PlanError: failures come so fast that the training makes no progress.
    """
    step_s = plan.step.total_ms / 1e3
    steps = math.ceil(budget.tokens / (shape.cfg.train.global_batch_size * shape.cfg.model.seq_length))
    work_s, devices = steps * step_s, shape.world_size
    mtbf_s = math.inf if budget.mtbf_hours is None else budget.mtbf_hours * HOUR_S / devices
    failures = Failures(mtbf_s=mtbf_s, save_s=budget.save_s, restart_s=budget.restart_s)
    interval = _best_steps(failures, step_s, steps)
    expected_s = work_s if interval is None else failures.expected_s(work_s, interval * step_s)
    if not math.isfinite(expected_s) or expected_s > 1000 * work_s:
        rule = f"is too short for {devices} devices: one of them fails every {mtbf_s:.0f} s, and no save is reached"
        remedy = "Use fewer devices, or lower --save-s and --restart-s."
        raise PlanError(Problem(fields=("--mtbf-hours",), value=budget.mtbf_hours, rule=rule, remedy=remedy))
    device_hours = expected_s * devices / HOUR_S
    return Forecast(
        steps=steps,
        ideal_days=work_s / DAY_S,
        days=expected_s / DAY_S,
        days_range=_days_range(failures, work_s, interval, step_s, expected_s),
        goodput=work_s / expected_s,
        failures=0.0 if interval is None else expected_s / mtbf_s,
        save_interval=interval,
        young_steps=None if interval is None else failures.young_s() / step_s,
        daly_steps=None if interval is None else failures.daly_s() / step_s,
        spares=None if interval is None else _spares(devices, node_size, mtbf_s),
        device_hours=device_hours,
        megawatt_hours=None if budget.watts is None else device_hours * budget.watts / 1e6,
        cost=None if budget.price is None else device_hours * budget.price,
    )


def search_numbers(
    numbers: Sequence[int], budget: Budget | None, machine: Machine, search: Callable[[int], list[Candidate]]
) -> list[Candidate]:
    """Candidates on one number of devices, fastest first, or on several, fewest device hours first.

    Raises:
        PlanError: nothing fits any of the numbers.
    """
    if len(numbers) == 1 or budget is None:
        return search(numbers[0])
    found, problems = [], []
    for number in numbers:
        try:
            found += search(number)
        except PlanError as error:
            problems += error.problems
    if not found:
        raise PlanError(problems)
    return sorted(found, key=lambda one: forecast(budget, one.plan, one.shape, machine.node_size).device_hours)


def _best_steps(failures: Failures, step_s: float, steps: int) -> int | None:
    """The best interval in complete steps; None if nothing fails."""
    best_s = failures.best_interval_s()
    if math.isinf(best_s):
        return None
    below = max(1, min(steps, math.floor(best_s / step_s)))
    return min((below, min(steps, below + 1)), key=lambda n: failures.expected_s(1.0, n * step_s))


def _days_range(
    failures: Failures, work_s: float, interval: int | None, step_s: float, expected_s: float
) -> tuple[float, float] | None:
    if interval is None:
        return None
    runs = max(20, min(MOST_RUNS, int(MOST_DRAWS * failures.mtbf_s / expected_s)))
    times = failures.simulate_s(work_s, interval * step_s, runs)
    return times[runs // 20] / DAY_S, times[-1 - runs // 20] / DAY_S


def _spares(devices: int, node_size: int, mtbf_s: float) -> int:
    nodes = -(-devices // node_size)
    return spare_nodes(nodes, mtbf_s * nodes, REPAIR_S)


@dataclass(frozen=True, slots=True)
class DepthCost:
    """A plan with another number of MTP depths; None where no split is legal or fits."""

    depths: int
    plan: Plan | None


def depth_costs(planner: Planner, limit_bytes: float | None) -> list[DepthCost]:
    """Plans with 0 up to one more than the config's MTP depths, with the same sizes and each with its best split."""
    configured, found = planner.shape.depths.count, []
    for depths in range(configured + 2):
        plan = None
        with suppress(ConfigError, PlanError):  # refused, or too full: the row says so
            plan = _with_depths(planner, depths, limit_bytes)
        found.append(DepthCost(depths, plan))
    return found


def _with_depths(planner: Planner, depths: int, limit_bytes: float | None) -> Plan:
    cfg = before_phases(planner.shape.cfg)
    cfg.model.update(mtp_num_layers=depths, mtp_depth_weights=None, pipeline_model_parallel_layout="auto")
    if depths < 2:
        cfg.model.mtp_use_repeated_layer = False
    world_size = planner.shape.world_size
    other = replace(planner, shape=RunShape.of(cfg.finalize(world_size), world_size))
    if not is_planned(cfg.model):
        return other.plan(PipelineLayout.of(cfg.model))
    return other.plan(other.problem().layout(other.choose(limit_bytes).split))
