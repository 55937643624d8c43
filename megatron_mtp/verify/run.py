"""Runs a shrunk recipe at several layouts on the CPU and compares each with one rank: loss, counts, routing, every
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.filled import filled
from megatron_mtp.device.worker_pool import WorkerError, worker_pools
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.logs import silence_noise
from megatron_mtp.verify.batches import BatchSpec
from megatron_mtp.verify.cases import Layout, parse_layouts
from megatron_mtp.verify.shrink import shrink

PRELOAD = ("megatron_mtp.verify.preload",)
DENSE_LAYOUTS = "tp=2; tp=2,sp=1; pp=2; pp=2,vp=2; cp=2; dp=2; dp=2,distopt=1,overlap=1; mbs=1"
EXPERT_LAYOUTS = (
    "tp=2,sp=1; tp=2,sp=1,ep=2,etp=1; pp=2; pp=2,vp=2; cp=2; ep=2; pp=2,ep=2; dp=2,distopt=1,overlap=1; mbs=1"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One layout: how it differs from one rank, or why it could not run."""

    layout: str
    ranks: int
    seconds: float
    losses: list[float]  # relative difference of each depth's loss
    counts_equal: bool
    acceptance_equal: bool
    gradient: float  # worst, and its parameter
    gradient_name: str
    faults: list[str]

    @property
    def is_right(self) -> bool:
        """Whether everything lies within the tolerances of verify_compare."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json; null stands where there is no finite number."""
        return {
            "layout": self.layout,
            "ranks": self.ranks,
            "right": self.is_right,
            "losses_relative_difference": [_finite_or_none(value) for value in self.losses],
            "counts_equal": self.counts_equal,
            "acceptance_equal": self.acceptance_equal,
            "gradient_difference": _finite_or_none(self.gradient),
            "gradient_parameter": self.gradient_name,
            "faults": self.faults,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be run: configs finalized for each layout, and the batches."""

    changes: list[str]
    reference: ConfigContainer
    layouts: list[tuple[Layout, ConfigContainer]]
    spec: BatchSpec


def default_layouts(cfg: ConfigContainer) -> str:
    """One of each parallelism that the model's kind can use, at most four ranks each."""
    return EXPERT_LAYOUTS if cfg.model.num_moe_experts else DENSE_LAYOUTS


def plan(cfg: ConfigContainer, layouts: str | None) -> Plan:
    """Reads and checks everything before a process is started.

    Args:
        cfg: a recipe with the user's changes, not finalized.
        layouts: as verify_layout.parse_layouts reads them; None: default_layouts.

    Raises:
        ConfigError: the recipe is wrong, a layout cannot be read, or it cannot be.
    """
    parsed = parse_layouts(default_layouts(cfg) if layouts is None else layouts)
    small, changes = shrink(cfg, parsed)
    placed, problems = [], []
    for layout in parsed:
        try:
            placed.append((layout, layout.apply(small)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    plain = small.copy()
    plain.model.recompute_granularity = plain.model.recompute_method = None
    plain.model.recompute_num_layers = plain.model.recompute_modules = None
    reference = Layout.parse("").apply(plain)
    spec = BatchSpec(
        num_samples=reference.train.global_batch_size,
        seq_length=reference.model.seq_length,
        vocab_size=filled(reference.model.vocab_size),
        num_depths=reference.model.mtp_num_layers,
        mask="documents" if reference.dataset.reset_attention_mask else "empty_micro_batch",
        micro_batch_size=reference.train.micro_batch_size,
    )
    return Plan(changes, reference, placed, spec)


def verify(plan: Plan, report: Callable[[str], None]) -> list[Outcome]:
    """Runs the reference, then each layout on the same batches.

    Args:
        plan: from `plan`.
        report: called with what is about to run.

    Raises:
        WorkerError: the reference itself failed.
    """
    silence_noise()  # before the imports that make it
    from megatron_mtp.verify.measure import measure

    outcomes = []
    with worker_pools(PRELOAD) as pool_of:
        report("one rank, the reference")
        reference = pool_of(1).run(measure, plan.reference, plan.spec)[0]
        for layout, cfg in plan.layouts:
            ranks = layout.world_size(cfg)
            report(f"{layout.text} on {ranks} {'rank' if ranks == 1 else 'ranks'}")
            try:
                got = pool_of(ranks).run(measure, cfg, plan.spec)[0]
            except WorkerError as error:
                outcomes.append(_failure(layout.text, ranks, plan.spec.num_depths, error))
            else:
                outcomes.append(_outcome(layout.text, ranks, got, reference))
    return outcomes


def _outcome(text: str, ranks: int, got: Any, reference: Any) -> Outcome:
    from megatron_mtp.verify.compare import compare

    difference = compare(got, reference)
    return Outcome(
        layout=text,
        ranks=ranks,
        seconds=got.seconds,
        losses=difference.losses,
        counts_equal=difference.counts_equal,
        acceptance_equal=difference.acceptance_equal,
        gradient=difference.gradient,
        gradient_name=difference.gradient_name,
        faults=difference.faults(),
    )


def _failure(text: str, ranks: int, num_depths: int, error: WorkerError) -> Outcome:
    reason = str(error).strip().splitlines()[-1]
    nothing = [float("inf")] * (1 + num_depths)
    return Outcome(text, ranks, 0.0, nothing, False, False, float("inf"), "none", [f"it did not run: {reason}"])


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Prints the table for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Relative difference from one rank", title_justify="left", show_lines=True)
    table.add_column("layout", no_wrap=True)
    for name in ("ranks", "loss of each depth", "targets", "acceptance", "worst gradient", ""):
        table.add_column(name, overflow="fold")
    for outcome in outcomes:
        table.add_row(
            outcome.layout,
            str(outcome.ranks),
            "\n".join(f"{value:.1e}" for value in outcome.losses),
            _word(outcome.counts_equal),
            _word(outcome.acceptance_equal),
            f"{outcome.gradient:.1e} {outcome.gradient_name}",
            "[green]right[/]" if outcome.is_right else "[red]OFF[/]",
        )
    console = Console()
    console.print(table)
    for outcome in outcomes:
        for fault in outcome.faults:
            console.print(f"{outcome.layout}: {fault}", markup=False, highlight=False)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _word(is_equal: bool) -> str:
    return "equal" if is_equal else "[red]differ[/]"
