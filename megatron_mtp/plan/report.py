"""Plans as text, as plain data, and as YAML that `pretrain --config` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.units import GIB
from megatron_mtp.config.yaml_text import dump_yaml
from megatron_mtp.parallel.facts import short_count, short_layout
from megatron_mtp.parallel.planner.planner import Plan
from megatron_mtp.plan.compare import Plans
from megatron_mtp.plan.phases import HEADER as PHASE_HEADER
from megatron_mtp.plan.phases import PhasePlan, phase_data, phase_rows
from megatron_mtp.plan.training_report import DEPTH_HEADER, depth_rows, training_cells, training_lines
from megatron_mtp.profile.noise import noise_of_notes

OVERLAY_FIELDS = (
    "tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size recompute_granularity "
    "recompute_method recompute_num_layers recompute_modules"
).split()


def as_text(recipe: str, plans: Plans, phases: Sequence[PhasePlan] = ()) -> str:
    """Plans as text for a terminal.

    Args:
        phases: of the run, the first of them with `plans`; empty: it has none.
    """
    chosen = plans.chosen
    profile = plans.profile
    source = (
        f"measured on {profile.device}{noise_of_notes(profile.notes)}"
        if profile
        else f"estimated for {plans.machine.name}"
    )
    sizes = ", ".join(f"{name} {size}" for name, size in _sizes(plans.cfg.model).items())
    lines = [
        f"{recipe}: {plans.world_size} devices, {sizes}, micro-batch {plans.cfg.train.micro_batch_size}, "
        f"{chosen.num_microbatches} micro-batches a step; times {source}{_assumed(plans)}",
        "",
        f"layout: {chosen.layout.string}",
        f"        {short_layout(chosen.layout.string)}",
        f"why:    {reason(plans)}",
        "",
        *_table(STAGE_HEADER, stage_rows(chosen)),
        "",
        step_line(chosen),
    ]
    if plans.others:
        compared = {"planned" if plans.choice else "as given": chosen, **plans.others}
        rows = [comparison_row(name, plan, chosen) for name, plan in compared.items()]
        lines += ["", *_table(COMPARE_HEADER, rows)]
    if plans.candidates:
        header = SEARCH_HEADER if plans.budget is None else BUDGET_HEADER
        lines += ["", *_table(header, search_rows(plans, header))]
    if plans.training is not None:
        lines += ["", *training_lines(plans), "", *_table(DEPTH_HEADER, depth_rows(plans))]
    for before, one in pairwise(phases):
        later = one.plans.chosen
        if later == before.plans.chosen:
            lines += ["", f"phase {one.phase.name}, from step {one.phase.start.iteration:,} on: the same plan"]
            continue
        lines += ["", f"phase {one.phase.name}, from step {one.phase.start.iteration:,} on: {later.layout.string}"]
        lines += ["", *_table(STAGE_HEADER, stage_rows(later)), "", step_line(later)]
    if phases:
        lines += ["", *_table(PHASE_HEADER, phase_rows(phases))]
    return "\n".join(lines)


def _assumed(plans: Plans) -> str:
    words = plans.planner.assume.words()
    return f", assuming {words}" if words else ""


STAGE_HEADER = (
    "stage holds forward_ms backward_ms parameters weights gradients optimizer activations workspace GiB idle".split()
)
COMPARE_HEADER = "split step_s against bubble tokens/s MFU GiB layout".split()
SEARCH_HEADER = "# TP PP VP CP EP DP mbs recompute step_s tokens/s MFU bubble GiB layout".split()
BUDGET_HEADER = ["#", "devices", *SEARCH_HEADER[1:-1], "days", "device_hours", "cost", "layout"]


def stage_rows(plan: Plan) -> list[list[str]]:
    """One row for each chunk; totals of a stage are on the row of its first chunk."""
    rows = []
    for stage in plan.stages:
        for v, (holds, time) in enumerate(zip(stage.holds, stage.chunks, strict=True)):
            name = str(stage.rank) if plan.layout.vp == 1 else f"{stage.rank}.{v}"
            parts = (*asdict(stage.memory).values(), stage.memory.total)
            totals = [short_count(stage.parameters), *(f"{part / GIB:.2f}" for part in parts), f"{stage.idle:.1%}"]
            row = [name, short_layout(holds), f"{time.forward_ms:.2f}", f"{time.backward_ms:.2f}"]
            rows.append(row + (totals if v == 0 else [""] * len(totals)))
    return rows


def step_line(plan: Plan) -> str:
    """The time of a step and its rates."""
    step = plan.step
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    return (
        f"step {step.total_ms / 1e3:.3f} s = pipeline {step.pipeline_ms / 1e3:.3f} (bubble {plan.bubble:.1%}) + update "
        f"{step.update_ms / 1e3:.3f} + data parallel {step.reduce_ms / 1e3:.3f} + other {step.other_ms / 1e3:.3f}; "
        f"{plan.tokens_per_s:,.0f} tokens/s{mfu}"
    )


def comparison_row(name: str, plan: Plan, chosen: Plan) -> list[str]:
    """One split, compared with the chosen one."""
    against = "" if plan is chosen else f"{plan.step.total_ms / chosen.step.total_ms - 1:+.2%}"
    cells = {"split": name if len(name) <= 24 else name[:21] + "...", "against": against} | _rates(plan)
    return [cells[column] for column in COMPARE_HEADER]


def search_rows(plans: Plans, header: list[str]) -> list[list[str]]:
    """One row for each candidate; with a budget also what the training takes."""
    rows = []
    for number, found in enumerate(plans.candidates, start=1):
        cells = {"#": str(number), "DP": str(found.dp), "mbs": str(found.cfg.train.micro_batch_size)}
        cells |= {name: str(size) for name, size in _sizes(found.cfg.model).items()}
        cells |= {"recompute": found.recompute} | _rates(found.plan)
        cells |= training_cells(plans, found.plan, found.shape)
        rows.append([cells[column] for column in header])
    return rows


def _rates(plan: Plan) -> dict[str, str]:
    """The cells of a plan by the columns that comparison and search share."""
    return {
        "step_s": f"{plan.step.total_ms / 1e3:.3f}",
        "bubble": f"{plan.bubble:.1%}",
        "tokens/s": f"{plan.tokens_per_s:,.0f}",
        "MFU": "-" if plan.mfu is None else f"{plan.mfu:.1%}",
        "GiB": f"{plan.peak_bytes / GIB:.1f}",
        "layout": short_layout(plan.layout.string),
    }


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "TP": model.tensor_model_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "VP": model.virtual_pipeline_model_parallel_size,
        "CP": model.context_parallel_size,
        "EP": model.expert_model_parallel_size,
    }


def reason(plans: Plans) -> str:
    """Why this layout, in one sentence."""
    chosen, planner = plans.chosen, plans.planner
    if chosen.layout.pp == 1:
        return "there is one stage, which holds everything."
    problem = planner.problem()
    layer = max(layer.total_ms for layer in problem.layers)
    weights = {
        "the embedding": problem.embedding,
        f"{problem.num_depths} MTP layer{'s' * (problem.num_depths > 1)}": problem.mtp,
        f"{1 + problem.num_depths} pass{'es' * (problem.num_depths > 0)} through the head": problem.loss,
    }
    parts = [f"{name} {t.total_ms / layer:.1f}" for name, t in weights.items() if t.forward_ms]
    loads = [sum(t.total_ms for t in stage.chunks) for stage in chosen.stages]
    slowest = max(range(len(loads)), key=lambda stage: round(loads[stage], 9))  # of equal stages the first
    text = (
        f"counted in decoder layers, {', '.join(parts)}; so stage {slowest} is the slowest with "
        f"{loads[slowest] / layer:.1f}"
    )
    if plans.choice is None:
        return f"{text}. The layout is the config's; pipeline_model_parallel_layout=auto would look for a better one."
    more = f"more than {plans.choice.gap:.1%} " if plans.choice.gap >= 1e-4 else ""
    even = plans.others.get("even")
    gain = "" if even is None else f", an even split takes {even.step.total_ms / chosen.step.total_ms - 1:.1%} longer"
    return f"{text}{gain}, and no legal split that fits is {more}faster under these part times."


def as_data(recipe: str, plans: Plans, phases: Sequence[PhasePlan] = ()) -> dict[str, Any]:
    """Plans as plain data. Arguments as `as_text`."""
    data: dict[str, Any] = {
        "recipe": recipe,
        "devices": plans.world_size,
        "hardware": plans.machine.name,
        "profile": None if plans.profile is None else plans.profile.device,
        "assume": asdict(plans.planner.assume),
        "memory_limit_bytes": plans.limit_bytes,
        "reason": reason(plans),
        "plan": plan_data(plans.chosen),
        "gap": None if plans.choice is None else plans.choice.gap,
        "compare": {name: plan_data(plan) for name, plan in plans.others.items()},
        "costs": asdict(plans.planner.costs),
    }
    if plans.training is not None and plans.budget is not None:
        data["budget"], data["training"] = asdict(plans.budget), asdict(plans.training)
        found = {one.depths: one.plan for one in plans.depths}
        data["depths"] = {depths: plan and plan_data(plan) for depths, plan in found.items()}
    if phases:
        data["phases"] = phase_data(phases, plan_data)
    if plans.candidates:
        data["search"] = [
            {
                "devices": found.shape.world_size,
                "dp": found.dp,
                "recompute": found.recompute,
                "micro_batch_size": found.cfg.train.micro_batch_size,
                **{name: getattr(found.cfg.model, name) for name in OVERLAY_FIELDS},
                "plan": plan_data(found.plan),
            }
            for found in plans.candidates
        ]
    return data


def plan_data(plan: Plan) -> dict[str, Any]:
    """One plan as plain data."""
    return {
        "layout": plan.layout.string,
        "step_ms": plan.step.total_ms,
        **asdict(plan.step),
        "bubble": plan.bubble,
        "num_microbatches": plan.num_microbatches,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "peak_bytes": plan.peak_bytes,
        "stages": [asdict(stage) | {"memory_total_bytes": stage.memory.total} for stage in plan.stages],
    }


def overlay(recipe: str, plans: Plans) -> str:
    """YAML for `pretrain --config`: the layout and the sizes that it is for."""
    cfg = plans.cfg
    model = {name: getattr(cfg.model, name) for name in OVERLAY_FIELDS}
    model["pipeline_model_parallel_layout"] = plans.chosen.layout.string
    data = {"model": model, "train": {"micro_batch_size": cfg.train.micro_batch_size}}
    note = f"# megatron-mtp plan {recipe}: {plans.world_size} devices, step {plans.chosen.step.total_ms / 1e3:.3f} s"
    return f"{note}\n{dump_yaml(data)}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; words are aligned to the left, numbers to the right."""
    cells = [[name.replace("_", " ") for name in header], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if name in ("split", "holds", "layout", "phase") else ">" for name in header]
    forms = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in cells]
