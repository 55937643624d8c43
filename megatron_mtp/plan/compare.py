"""Makes the plan of a config, and plans to compare it with. Imports neither torch nor Megatron-Core."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.machines import Machine, find_machine
from megatron_mtp.config.phase_configs import before_phases, fewest_processes
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import ConfigError, PlanError, Problem
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.auto_layout import is_planned, machine_of, make_planner
from megatron_mtp.parallel.planner.part_costs import Profile
from megatron_mtp.parallel.planner.planner import Plan, Planner
from megatron_mtp.parallel.planner.search_sizes import Candidate, recompute_fields, search_sizes
from megatron_mtp.parallel.planner.search_split import SplitChoice
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.plan.training import Budget, DepthCost, Forecast, depth_costs, forecast, search_numbers
from megatron_mtp.recipes.published import PUBLISHED


@dataclass(frozen=True, slots=True)
class Plans:
    """The result of `make_plans`.

    Attributes:
        planner: made `chosen`; after a search, it is for the best candidate.
        machine: the device that was estimated for; its memory is the limit.
        chosen: the plan to use.
        choice: how it was found; None for a layout that the config gives.
        others: name -> plan to compare it with.
        candidates: the results of a search, best first.
        budget: of a whole training; None: only a step is planned.
        training: with `chosen`; None without a budget.
        depths: what other numbers of MTP depths cost; empty without a budget.
    """

    planner: Planner
    machine: Machine
    profile: Profile | None
    limit_bytes: float | None
    chosen: Plan
    choice: SplitChoice | None
    others: dict[str, Plan]
    candidates: list[Candidate]
    budget: Budget | None = None
    training: Forecast | None = None
    depths: tuple[DepthCost, ...] = ()

    @property
    def cfg(self) -> ConfigContainer:
        """The finalized config of `chosen`."""
        return self.planner.shape.cfg

    @property
    def world_size(self) -> int:
        """Devices of `chosen`."""
        return self.planner.shape.world_size


def make_plans(
    cfg: ConfigContainer,
    devices: int | None = None,
    hardware: str | None = None,
    profile_path: Path | None = None,
    memory_gib: float | None = None,
    compare: Sequence[str] = (),
    assume: Assumptions = NOTHING,
    budget: Budget | None = None,
    or_devices: Sequence[int] = (),
    *,
    search: bool = False,
    top: int = 10,
    report: Callable[[str], None] = lambda _: None,
) -> Plans:
    """Plans a config. For the options see `megatron-mtp plan --help`.

    Args:
        cfg: not finalized yet.
        report: called with a line about the search's progress.

    Raises:
        ConfigError: the config is wrong. PlanError: no layout is legal or fits, or an option is wrong.
    """
    machine = machine_of(cfg) if hardware is None else find_machine(hardware, "--hardware")
    profile = None if profile_path is None else Profile.read(profile_path)
    limit: float | None = machine.usable_bytes
    if memory_gib is not None and not math.isfinite(memory_gib):
        raise _wrong_option("--memory", "must be a finite number of GiB; 0: no limit")
    if memory_gib is not None:
        limit = memory_gib * GIB or None
    elif profile is not None and hardware is None:
        limit = None  # a profile names no memory
    if profile is not None and assume != NOTHING:
        rule = "changes estimates, and a profile is measured"
        raise _wrong_option("--assume", rule, "Leave out --profile or --assume.")
    if or_devices and (budget is None or not search):
        rule = "compares whole trainings on several numbers of devices"
        raise _wrong_option("--or-devices", rule, "Add --search and --tokens, or leave it out.")
    candidates: list[Candidate] = []
    if search:
        if devices is None:
            raise _wrong_option("--search", "needs --devices N, the number of devices to spread the model over")
        if profile is not None:
            rule = "tries other sizes than the profile was measured with"
            raise _wrong_option("--search", rule, "Leave out --profile or --search.")
        numbers = [devices, *or_devices]
        candidates = search_numbers(
            numbers, budget, machine, lambda n: search_sizes(cfg, machine, n, limit, top, report, assume)
        )[:top]
        cfg, devices = candidates[0].cfg, candidates[0].shape.world_size
    else:
        devices = devices or smallest_world(cfg)
        cfg = cfg.copy().finalize(devices)
    if cfg.model.vocab_size is None:
        rule = "is not known before the tokenizer is opened"
        raise PlanError(Problem(fields=("model.vocab_size",), rule=rule, remedy="Set it to plan."))
    planner = make_planner(RunShape.of(cfg, devices), machine, profile, assume)
    chosen, choice = _choose(planner, limit)
    plans = Plans(planner, machine, profile, limit, chosen, choice, _others(planner, compare), candidates)
    if budget is None:
        return plans
    training = forecast(budget, chosen, planner.shape, machine.node_size)
    depths = tuple(depth_costs(planner, limit))
    return replace(plans, budget=budget, training=training, depths=depths)


def default_devices(recipe: str, cfg: ConfigContainer) -> int:
    """As many devices as the recipe is for, or the fewest that form one replica where `cfg` was changed too much.

    Args:
        cfg: the recipe with the user's changes, not finalized.

    Raises:
        ConfigError: the config is wrong for any number of devices.
    """
    smallest, published = smallest_world(cfg), PUBLISHED.get(recipe)
    if published is not None and smallest != published.gpus:
        with suppress(ConfigError):
            cfg.copy().finalize(published.gpus)
            return published.gpus
    return smallest


def smallest_world(cfg: ConfigContainer) -> int:
    """The fewest processes that form one replica with these parallel sizes, whether it fits their memory or not.

    Raises:
        ConfigError: the config is wrong for any number of processes.
    """
    return fewest_processes(cfg.copy().finalize())


def _choose(planner: Planner, limit: float | None) -> tuple[Plan, SplitChoice | None]:
    model, choice = planner.shape.cfg.model, None
    if is_planned(model):
        try:
            choice = planner.choose(limit)
        except PlanError as error:
            more = _nearest_fit(planner, limit)
            raise PlanError([replace(p, remedy=f"{p.remedy} {more}".strip()) for p in error.problems]) from None
    plan = planner.plan(planner.problem().layout(choice.split) if choice else PipelineLayout.of(model))
    if limit is not None and plan.peak_bytes > limit:
        rule = (
            f"needs {plan.peak_bytes / GIB:.1f} GiB on its fullest stage, and a device has {limit / GIB:.1f} GiB "
            "to use (--memory GIB sets another limit, 0 none)"
        )
        fields, value = ("model.pipeline_model_parallel_layout",), plan.layout.string
        raise PlanError(Problem(fields=fields, value=value, rule=rule, remedy=_nearest_fit(planner, limit)))
    return plan, choice


def _nearest_fit(planner: Planner, limit: float | None) -> str:
    """A sentence that names the first single change after which the even split fits."""
    if limit is None:
        return ""
    model, train = planner.shape.cfg.model, planner.shape.cfg.train
    full = recompute_fields(model, "full")
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if train.micro_batch_size > 1:
        changes.append(({}, {"micro_batch_size": train.micro_batch_size // 2}))
    changes += [(full, {}), (full, {"micro_batch_size": 1})]
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        bigger: dict[str, Any] = {name: 2 * getattr(model, name), "pipeline_model_parallel_layout": "auto"}
        if name.startswith("tensor"):
            bigger["sequence_parallel"] = True
        changes += [(bigger, {}), (bigger | full, {})]
    for in_model, in_train in changes:
        if (peak := _peak_after(planner, in_model, in_train)) is not None and peak <= limit:
            words = [f"model.{name}={value}" for name, value in in_model.items() if value is not None]
            words += [f"train.{name}={value}" for name, value in in_train.items()]
            return f"Nearest that fits: {' '.join(words)}, with {peak / GIB:.1f} GiB in an even split."
    return (
        "None of: a smaller micro-batch, recomputation, twice the TP, PP or EP fits; use --search with more --devices."
    )


def _peak_after(planner: Planner, in_model: dict[str, Any], in_train: dict[str, Any]) -> float | None:
    cfg = before_phases(planner.shape.cfg)
    cfg.model.update(**in_model)
    cfg.train.update(**in_train)
    cfg.validation.update(eval_micro_batch_size=None, eval_global_batch_size=None)
    try:
        world_size = max(planner.shape.world_size, smallest_world(cfg))
        cfg.finalize(world_size)
    except (ConfigError, PlanError):
        return None
    memory = MemoryModel(RunShape.of(cfg, world_size), planner.is_cpu, planner.assume)
    return memory.fullest_bytes(PipelineLayout.parse("even", cfg.model))


def _others(planner: Planner, wanted: Sequence[str]) -> dict[str, Plan]:
    """The even split and those that the user names."""
    model, found, wrong = planner.shape.cfg.model, {}, []
    if model.pipeline_model_parallel_size > 1:
        found["even"] = planner.plan(PipelineLayout.parse("even", model))
    for text in wanted:
        try:
            found[text] = planner.plan(_layout_of_text(text, model))
        except PlanError as error:
            wrong += [replace(p, fields=("--compare",), value=text) for p in error.problems]
    if wrong:
        raise PlanError(wrong)
    return found


def _layout_of_text(text: str, model: ModelConfig) -> PipelineLayout:
    """A split as a user writes it: numbers of decoder layers, or Megatron's string."""
    inner = text.strip(" []")
    if not re.fullmatch(r"[-+0-9, ]+", inner):
        return PipelineLayout.parse(text, model)
    if not all(re.fullmatch(r" *-?[0-9]{1,9} *", part) for part in inner.split(",")):
        raise PlanError("must be numbers of decoder layers, such as 5,6,6,4")
    return PipelineLayout.parse([int(part) for part in inner.split(",")], model)


def _wrong_option(option: str, rule: str, remedy: str = "") -> PlanError:
    return PlanError(Problem(fields=(option,), rule=rule, remedy=remedy))
