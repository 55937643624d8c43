"""Runs a shrunk recipe at several layouts on the CPU and compares each with one rank.

Compared are the loss of each depth, counts, routing and every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.filled import filled
from megatron_mtp.config.problem import problem
from megatron_mtp.device.worker_pool import WorkerError, worker_pools
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.logs import silence_noise
from megatron_mtp.verify.batches import BatchSpec
from megatron_mtp.verify.placements import Placement, parse_layouts
from megatron_mtp.verify.shrink import shrink

PRELOAD = ("megatron_mtp.verify.preload",)
DENSE_LAYOUTS = "tp=2; tp=2,sp=1; pp=2; pp=2,vp=2; cp=2; dp=2; dp=2,distopt=1,overlap=1"
EXPERT_LAYOUTS = "tp=2,sp=1; tp=2,sp=1,ep=2,etp=1; pp=2; pp=2,vp=2; cp=2; ep=2; pp=2,ep=2; dp=2,distopt=1,overlap=1"
MICRO_BATCH = "; mbs=1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one layout differs from one rank, or why it did not run.

    Attributes:
        layout: its text.
        losses: relative difference of each depth's loss, [1+D].
        gradient, gradient_name: the largest difference of a gradient (see `compare`), and the parameter.
        faults: every difference beyond its tolerance, in words.
    """

    layout: str
    ranks: int
    seconds: float
    losses: list[float]
    counts_equal: bool
    acceptance_equal: bool
    gradient: float
    gradient_name: str
    faults: list[str]

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerances of `compare`."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json; None in place of numbers that are not finite."""
        return {
            "layout": self.layout,
            "ranks": self.ranks,
            "right": self.passed,
            "losses_relative_difference": [_finite_or_none(value) for value in self.losses],
            "counts_equal": self.counts_equal,
            "acceptance_equal": self.acceptance_equal,
            "gradient_difference": _finite_or_none(self.gradient),
            "gradient_parameter": self.gradient_name,
            "faults": self.faults,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class PreparedRuns:
    """The runs to compare.

    Attributes:
        changes: what shrinking changed, as "field old -> new".
        reference: config of the one-rank run.
        layouts: each layout and its config.
        spec: of the batches that all of them read.
    """

    changes: list[str]
    reference: ConfigContainer
    layouts: list[tuple[Placement, ConfigContainer]]
    spec: BatchSpec


def default_layouts(cfg: ConfigContainer) -> str:
    """One layout for each parallelism that the model can use, of at most four ranks, and a smaller micro-batch."""
    layouts = EXPERT_LAYOUTS if cfg.model.num_moe_experts else DENSE_LAYOUTS
    return layouts if _balances_micro_batches(cfg) else layouts + MICRO_BATCH


def _balances_micro_batches(cfg: ConfigContainer) -> bool:
    """Whether the balancing loss depends on the size of a micro-batch by definition."""
    return cfg.model.moe_router_load_balancing_type == "aux_loss" and bool(cfg.model.num_moe_experts)


def prepare(cfg: ConfigContainer, layouts: str | None) -> PreparedRuns:
    """Reads and checks everything before a process starts.

    Args:
        cfg: a recipe with the user's changes, not finalized.
        layouts: text for `parse_layouts`; None: `default_layouts`.

    Raises:
        ConfigError: the recipe is invalid, or a layout cannot be parsed or is invalid.
    """
    parsed = parse_layouts(default_layouts(cfg) if layouts is None else layouts)
    small, changes = shrink(cfg, parsed)
    placed, problems = [], []
    for layout in parsed:
        if "mbs" in layout.values and _balances_micro_batches(cfg):
            rule = f"--layouts, {layout.text}: 'aux_loss' balances within a micro-batch, so its size changes the curve"
            remedy = "Compare layouts of one micro-batch size, or use 'seq_aux_loss'."
            problems.append(problem(cfg, "model.moe_router_load_balancing_type", rule, remedy))
            continue
        try:
            placed.append((layout, layout.apply(small)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    plain = small.copy()
    plain.model.recompute_granularity = plain.model.recompute_method = None
    plain.model.recompute_num_layers = plain.model.recompute_modules = None
    reference = Placement.parse("").apply(plain)
    spec = BatchSpec(
        num_samples=reference.train.global_batch_size,
        seq_length=reference.model.seq_length,
        vocab_size=filled(reference.model.vocab_size),
        num_depths=reference.model.mtp_num_layers,
        mask="documents" if reference.dataset.reset_attention_mask else "empty_micro_batch",
        micro_batch_size=reference.train.micro_batch_size,
    )
    return PreparedRuns(changes, reference, placed, spec)


def verify(comparison: PreparedRuns, report: Callable[[str], None]) -> list[Outcome]:
    """Runs the reference, then each layout on the same batches.

    Args:
        report: called with the name of each run before it starts.

    Raises:
        WorkerError: the reference itself failed.
    """
    silence_noise()  # before the imports that warn
    from megatron_mtp.verify.measure import measure

    outcomes = []
    with worker_pools(PRELOAD) as pool_of:
        report("one rank, the reference")
        reference = pool_of(1).run(measure, comparison.reference, comparison.spec)[0]
        for layout, cfg in comparison.layouts:
            ranks = layout.world_size(cfg)
            report(f"{layout.text} on {ranks} {'rank' if ranks == 1 else 'ranks'}")
            try:
                got = pool_of(ranks).run(measure, cfg, comparison.spec)[0]
            except WorkerError as error:
                outcomes.append(_failure(layout.text, ranks, comparison.spec.num_depths, error))
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
    """Prints a table, then the faults."""
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
            "[green]pass[/]" if outcome.passed else "[red]FAIL[/]",
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
