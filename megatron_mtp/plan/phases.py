"""The plans of a run's phases: each may have its own length of samples, batch and layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.timeline import Phase, Timeline
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import PlanError, Problem
from megatron_mtp.parallel.facts import short_count
from megatron_mtp.plan.compare import Plans

DAY_S = 86_400
HEADER = "phase from_step steps tokens sequence batch step_s days GiB layout".split()


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """One phase with its plan.

    Args:
        phase: of the timeline.
        steps, tokens: of the phase; None: the run has no length in steps, or ends before it.
        plans: its plan.
    """

    phase: Phase[ConfigContainer]
    steps: int | None
    tokens: int | None
    plans: Plans

    @property
    def days(self) -> float | None:
        """Days of its steps at the planned step time, without failures and saves; None: not known."""
        return None if self.steps is None else self.steps * self.plans.chosen.step.total_ms / 1e3 / DAY_S


def phase_plans(base: Plans, plan: Callable[[ConfigContainer], Plans]) -> list[PhasePlan]:
    """The plan of each phase of a run, that of the part before them first; empty for a run without phases.

    Args:
        base: the plan of that part, on all its devices.
        plan: plans the config of a phase, which is not finalized.

    Raises:
        PlanError: a phase has no layout that is legal and fits; names the phase.
    """
    if not base.cfg.phases:
        return []
    timeline, found = Timeline.of(base.cfg), []
    for index, phase in enumerate(timeline.phases):
        try:
            plans = plan(phase.cfg.copy()) if index else base
        except PlanError as error:
            raise error.within(f"phases.{phase.name}") from None
        found.append(PhasePlan(phase, *_length(timeline, index), plans))
    return found


def _length(timeline: Timeline[ConfigContainer], index: int) -> tuple[int | None, int | None]:
    """Steps and tokens of a phase."""
    start, end = timeline.phases[index].start, timeline.end_samples()
    last = index + 1 == len(timeline.phases)
    ends = [end] if end is not None else []
    ends += [] if last else [timeline.phases[index + 1].start.samples]
    if not ends or min(ends) <= start.samples:
        return None, None
    samples = min(ends)
    return timeline.iteration_at(samples) - start.iteration, timeline.tokens_at(samples) - start.tokens


def refuse_phases(cfg: ConfigContainer, options: Mapping[str, object]) -> None:
    """Refuses options that plan one config for a run with phases: a search of sizes, a training's length and cost.

    Args:
        options: their values by name; those that are not given are false.

    Raises:
        PlanError: the config has phases.
    """
    for option in [name for name, value in options.items() if value and cfg.phases]:
        rule = f"is about one config, and the run has phases: {', '.join(cfg.phases)}"
        remedy = (
            "Without it, the table of phases has each one's steps, tokens, days and layout. Add phases=null for the "
        )
        raise PlanError(Problem(fields=(option,), rule=rule, remedy=remedy + "part before them alone."))


def phase_rows(found: Sequence[PhasePlan]) -> list[list[str]]:
    """One row for each phase, and one for their sum."""
    rows = []
    for one in found:
        chosen, cfg = one.plans.chosen, one.plans.cfg
        cells = {
            "phase": one.phase.name,
            "from_step": f"{one.phase.start.iteration:,}",
            "steps": "-" if one.steps is None else f"{one.steps:,}",
            "tokens": "-" if one.tokens is None else short_count(one.tokens),
            "sequence": f"{cfg.model.seq_length:,}",
            "batch": f"{cfg.train.global_batch_size:,}",
            "step_s": f"{chosen.step.total_ms / 1e3:.3f}",
            "days": "-" if one.days is None else f"{one.days:.2f}",
            "GiB": f"{chosen.peak_bytes / GIB:.1f}",
            "layout": _sizes(cfg),
        }
        rows.append([cells[name] for name in HEADER])
    known = [one for one in found if one.steps is not None]
    total = {
        "phase": "all",
        "steps": f"{sum(one.steps or 0 for one in known):,}",
        "tokens": short_count(sum(one.tokens or 0 for one in known)),
        "days": f"{sum(one.days or 0.0 for one in known):.2f}",
    }
    return [*rows, [total.get(name, "") for name in HEADER]] if known else rows


def _sizes(cfg: ConfigContainer) -> str:
    model = cfg.model
    sizes = {
        "tp": model.tensor_model_parallel_size,
        "pp": model.pipeline_model_parallel_size,
        "cp": model.context_parallel_size,
        "ep": model.expert_model_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "-"


def phase_data(found: Sequence[PhasePlan], plan_data: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [
        {
            "name": one.phase.name,
            "iteration": one.phase.start.iteration,
            "samples": one.phase.start.samples,
            "tokens_before": one.phase.start.tokens,
            "steps": one.steps,
            "tokens": one.tokens,
            "days": one.days,
            "changes": list(one.phase.changes),
            "plan": plan_data(one.plans.chosen),
        }
        for one in found
    ]
