"""What a run is, as labelled lines: model, layout, batch, schedule, planned memory. Imports neither torch nor Megatron.

A training run prints them with its data as its first table; `show` prints them without.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.schedules import BatchSchedule, LearningRate, learning_rate
from megatron_mtp.config.timeline import Phase, ScheduleClock, Timeline
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import shown
from megatron_mtp.parallel.facts import facts, short_count, short_layout, short_parallel
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.parallel.planner.auto_layout import machine_of
from megatron_mtp.parallel.planner.stage_memory import MemoryModel
from megatron_mtp.parallel.resolve import ResolvedRun, resolve_phase

WIDTH = 80
LABEL_WIDTH = 12
MAX_VALUE = 24
"""Characters of a value that a phase sets and that is shown."""
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


def phase_rows(run: ResolvedRun) -> list[Row]:
    """What each phase that is to come holds: batch, parallel sizes and planned memory."""
    rows = []
    for index in range(run.phase_index + 1, len(run.timeline.phases)):
        phase = resolve_phase(run.timeline, index, run.world_size)
        train, sizes = phase.cfg.train, short_parallel(facts(phase.cfg)["parallel"])
        text = f"{phase.phase.name}: {train.global_batch_size:,} samples of {phase.cfg.model.seq_length:,} tokens, "
        text += f"{sizes if sizes != 'none' else 'no model parallelism'}, dp {phase.grid.dp_size}"
        if phase.cfg.model.vocab_size is not None:
            text += f"; {_memory_text(phase, None)}"
        rows.append(("phases", text))
    return rows


def phase_facts(timeline: Timeline[ConfigContainer]) -> list[dict[str, Any]]:
    """Where each phase begins and what it sets, as plain data."""
    return [
        {"name": phase.name, **asdict(phase.start), "changes": list(phase.changes)} for phase in timeline.phases[1:]
    ]


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
    """Where phases begin, where learning rate, batch size and loss factor change, and where the run ends, in order."""
    timeline, end = run.timeline, run.length_samples
    found = [(0, _start(run))]
    for index, phase in enumerate(timeline.phases):
        later = [after.start.samples for after in timeline.phases[index + 1 :]]
        inside = _rate_changes(run, index) if phase.schedule_from == index else []
        own = [after.start.samples for after in timeline.phases[index + 1 :] if after.schedule_from != index]
        found += [(samples, what) for samples, what in inside if not own or samples < own[0]]
        if index:
            found.append((phase.start.samples, f"phase {phase.name} begins: {_changes_text(timeline, index)}"))
        ramp = phase.cfg.train.rampup_batch_size
        if phase.batch_from == index and ramp is not None:
            full = phase.start.samples + ramp[2]
            found.append((full, f"the global batch has grown to {phase.cfg.train.global_batch_size:,}"))
        changes = _factor_changes(run, phase)
        found += [(samples, what) for samples, what in changes if not later or samples < later[0]]
    if end is not None:
        found.append((end, f"the run ends: {end:,} samples, {short_count(timeline.tokens_at(end))} tokens"))
    ordered = sorted(found, key=lambda change: change[0])
    return [
        Milestone(samples, timeline.iteration_at(samples), what, is_beyond=end is not None and samples > end)
        for samples, what in ordered
    ]


def _rate(run: ResolvedRun, index: int) -> LearningRate:
    """The learning-rate schedule that begins with a phase."""
    if index == run.phase.schedule_from:
        return run.learning_rate
    return learning_rate(run.timeline.phases[index].cfg, ScheduleClock(run.timeline, index))


def _factor(run: ResolvedRun, phase: Phase[ConfigContainer]) -> LossFactor:
    """The MTP loss factor of a phase."""
    is_own = phase is run.phase
    return run.loss_factor if is_own else LossFactor.parse(phase.cfg.model.mtp_loss_scaling_factor)


def _start(run: ResolvedRun) -> str:
    base = run.timeline.phases[0].cfg
    rate, factor = _rate(run, 0)(0), _factor(run, run.timeline.phases[0]).at(0)
    batch = BatchSchedule.of(base.train)
    text = f", loss factor {factor:g}" if base.model.mtp_num_layers else ""
    size = f", global batch {batch.size_at(0):,}" if batch.rampup is not None else ""
    return f"learning rate {rate:g}{text}{size}"


def _rate_changes(run: ResolvedRun, index: int) -> list[tuple[int, str]]:
    """(samples, what changes) of the learning-rate schedule that begins with a phase."""
    clock = ScheduleClock(run.timeline, index)
    rate, found = _rate(run, index), []
    warmup = int(rate.warmup)
    if warmup:
        found.append((clock.samples_at(warmup), f"warmup ends at {rate.max_lr:g}"))
    if rate.style == "constant" or warmup >= rate.decay:
        return found
    start = rate.decay - rate.wsd_decay if rate.style == "WSD" else warmup
    shape = f"{rate.style}, {rate.wsd_style}" if rate.style == "WSD" else rate.style
    return [
        *found,
        (clock.samples_at(start), f"decay starts ({shape})"),
        (clock.samples_at(rate.decay), f"decay ends at {rate(rate.decay):g}"),
    ]


def _factor_changes(run: ResolvedRun, phase: Phase[ConfigContainer]) -> list[tuple[int, str]]:
    """(samples, what changes) of the MTP loss factor after the start of a phase."""
    factor, found = _factor(run, phase), []
    if not phase.cfg.model.mtp_num_layers:
        return []
    for tokens, value in list(zip(factor.tokens, factor.factors, strict=True))[1:]:
        verb = "reaches" if factor.is_linear else "becomes"
        if tokens > phase.start.tokens:
            found.append((run.timeline.samples_at_tokens(tokens), f"the loss factor {verb} {value:g}"))
    return found


def _changes_text(timeline: Timeline[ConfigContainer], index: int) -> str:
    """What a phase sets: short values with their fields, long ones by the name of the field."""
    phase, texts = timeline.phases[index], []
    for field in phase.changes:
        section, name = field.split(".", 1)
        value = getattr(getattr(phase.cfg, section), name)
        is_short = value is not None and len(shown(value)) <= MAX_VALUE
        texts.append(f"{field} {shown(value)}" if is_short else field)
    if phase.schedule_from == index:
        texts.append(f"learning rate {learning_rate(phase.cfg, ScheduleClock(timeline, index))(0):g}")
    return ", ".join(texts) or "nothing changes"
