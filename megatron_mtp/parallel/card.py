"""What a run is, as labelled lines: model, layout, batch, schedule, planned memory. Imports neither torch nor Megatron.

A training run prints them with its data as its first table; `show` prints them without.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.config.units import GIB
from megatron_mtp.parallel.facts import facts, short_count, short_layout, short_parallel
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.parallel.planner.auto_layout import machine_of
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
from megatron_mtp.parallel.resolve import ResolvedRun

WIDTH = 80
LABEL_WIDTH = 12
Row = tuple[str, str]
"""A label and what stands beside it; a line break in the text stays one."""


def render(rows: Iterable[Row], width: int = WIDTH) -> str:
    """Rows as lines; long ones are wrapped below their text, and a label is not repeated."""
    lines, last = [], None
    for label, text in rows:
        for part in text.splitlines() or [""]:
            room = width - LABEL_WIDTH
            for line in textwrap.wrap(part, room, break_on_hyphens=False) if len(part) > room else [part]:
                lines.append(f"{'' if label == last else label:<{LABEL_WIDTH}}{line}".rstrip())
                last = label
    return "\n".join(lines)


def run_rows(run: ResolvedRun, *, is_cpu: bool | None = None, is_size_open: bool = False) -> list[Row]:
    """The rows that follow from the config and the number of processes.

    Args:
        is_cpu: plan memory for a CPU; None: if dist.device is "cpu".
        is_size_open: the number of processes is only the fewest that the parallel sizes allow.
    """
    cfg = run.cfg
    rows = [*_model_rows(run), _parallel_row(run, is_size_open)]
    rows.append(("stages", short_layout(run.layout.string)))
    batch = f"{cfg.train.global_batch_size:,} samples of {cfg.model.seq_length:,} tokens"
    rows.append(("batch", f"{batch}, micro-batch {cfg.train.micro_batch_size}"))
    rows += [("schedule", milestone.text) for milestone in milestones(run)]
    if run.length_samples is None:
        rows.append(("schedule", f"the run ends after {cfg.train.exit_duration_in_mins:g} minutes"))
    if cfg.model.vocab_size is not None:
        rows.append(("memory", _memory_text(run, is_cpu)))
    return rows


def _model_rows(run: ResolvedRun) -> list[Row]:
    model = run.cfg.model
    if model.vocab_size is None:
        return [("model", "parameters: not known before the tokenizer is opened; set model.vocab_size to see them")]
    count = count_parameters(model)
    is_sparse = count.active != count.total
    active = f", {short_count(count.active)} active for a token" if is_sparse else ""
    rows = [("model", f"{short_count(count.total)} parameters{active}; vocabulary {model.vocab_size:,}")]
    if run.depths.count:
        share = f"{short_count(count.mtp)} parameters, {count.mtp / count.total:.1%} of all"
        active = f", {short_count(count.mtp_active)} active" if is_sparse else ""
        factor = f"loss factor {model.mtp_loss_scaling_factor}, {model.mtp_variant}"
        rows.append(("MTP", f"{run.depths.count} depth{'s' * (run.depths.count > 1)}: {share}{active}; {factor}"))
    return rows


def _parallel_row(run: ResolvedRun, is_size_open: bool) -> Row:
    sizes = short_parallel(facts(run.cfg)["parallel"])
    text = sizes if sizes != "none" else "no model parallelism"
    if is_size_open:
        return "parallel", f"{text}; a multiple of {run.world_size} processes"
    text += f", dp {run.grid.dp_size}; {run.world_size} process{'es' * (run.world_size > 1)}"
    if run.planned is not None:
        text += f"; layout planned for {run.planned.machine.name} (dist.hardware)"
    return "parallel", text


def _memory_text(run: ResolvedRun, is_cpu: bool | None) -> str:
    memory = MemoryModel(run, is_cpu)
    sizes = [memory.rank(run.layout, stage).total for stage in range(run.layout.pp)]
    fullest = max(range(run.layout.pp), key=sizes.__getitem__)
    where = f" on stage {fullest}, the fullest" if run.layout.pp > 1 else ""
    text = f"{_size(sizes[fullest])} planned for each rank{where}"
    if run.planned is None and run.cfg.dist.hardware is None:
        return text
    machine = machine_of(run.cfg)
    fit = "" if sizes[fullest] <= machine.usable_bytes else ": it does not fit by estimate"
    return f"{text}; {machine.name} has {machine.memory_gib:.3g} GiB{fit}"


def _size(count: int) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"


@dataclass(frozen=True, slots=True)
class Milestone:
    """A point of the run at which its schedule changes.

    Args:
        samples: consumed before it.
        step: steps done before it.
        what: that happens there.
        is_beyond: the run ends before it.
    """

    samples: int
    step: int
    what: str
    is_beyond: bool = False

    @property
    def text(self) -> str:
        """As a line of the table."""
        return f"step {self.step:>9,}  {self.what}{' (after the end of the run)' if self.is_beyond else ''}"


def milestones(run: ResolvedRun) -> list[Milestone]:
    """Where learning rate, batch size and MTP loss factor change, and where the run ends, in order."""
    batch, end = BatchSchedule.of(run.cfg.train), run.length_samples
    found = [(0, _start(run, batch)), *_rate_changes(run), *_factor_changes(run)]
    if batch.rampup is not None:
        found.append((batch.rampup[2], f"the global batch has grown to {batch.global_batch_size:,}"))
    if end is not None:
        found.append((end, f"the run ends: {end:,} samples, {short_count(end * run.cfg.model.seq_length)} tokens"))
    ordered = sorted(found, key=lambda change: change[0])
    return [
        Milestone(samples, batch.step_at(samples), what, is_beyond=end is not None and samples > end)
        for samples, what in ordered
    ]


def _start(run: ResolvedRun, batch: BatchSchedule) -> str:
    factor = f", loss factor {run.loss_factor.at(0):g}" if run.depths.count else ""
    size = f", global batch {batch.size_at(0):,}" if batch.rampup is not None else ""
    return f"learning rate {run.learning_rate(0):g}{factor}{size}"


def _rate_changes(run: ResolvedRun) -> list[tuple[int, str]]:
    """(samples, what changes) of the learning rate."""
    rate, found = run.learning_rate, []
    warmup = int(rate.warmup)
    if warmup:
        found.append((warmup, f"warmup ends at {rate.max_lr:g}"))
    if rate.style == "constant" or warmup >= rate.decay:
        return found
    start = rate.decay - rate.wsd_decay if rate.style == "WSD" else warmup
    shape = f"{rate.style}, {rate.wsd_style}" if rate.style == "WSD" else rate.style
    return [
        *found,
        (start, f"decay starts ({shape})"),
        (rate.decay, f"decay ends at {run.learning_rate(rate.decay):g}"),
    ]


def _factor_changes(run: ResolvedRun) -> list[tuple[int, str]]:
    """(samples, what changes) of the MTP loss factor."""
    factor, found = run.loss_factor, []
    if not run.depths.count:
        return []
    for tokens, value in list(zip(factor.tokens, factor.factors, strict=True))[1:]:
        verb = "reaches" if factor.is_linear else "becomes"
        found.append((-(-tokens // run.cfg.model.seq_length), f"the loss factor {verb} {value:g}"))
    return found
