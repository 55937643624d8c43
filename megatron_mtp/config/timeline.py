"""Where the phases of a run begin, in steps, samples and tokens, and what each of them goes on with.

A phase begins after the first step that ends at or after its start. Where the phases so far have begun is known from
the checkpoint; where the others will follows from batch sizes and sequence lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config.phase_configs import before_phases, phase_configs
from megatron_mtp.config.phases import BASE, PhaseStart
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.errors import Problem


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is, at the end of a step.

    Args:
        iteration: steps done.
        samples, tokens: trained on, whatever the length of the samples.
        data: samples that were read: those that rollbacks passed over are counted too.
    """

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    data: int = 0


@dataclass(frozen=True, slots=True)
class Phase[C: RunConfig]:
    """One phase of a run, or the part before the first of them.

    Args:
        cfg: its config, without phases; derived, and finalized where the container is.
        start: where it has begun, or will.
        begins: start of the next phase; None: it is the last.
        schedule_from, batch_from, data_from: index in the timeline of the phase with which the learning rate, the
            growth of the global batch and the order of the data began that it goes on with.
        changes: fields that it sets, as "section.field".
    """

    name: str
    cfg: C
    start: Position
    begins: PhaseStart | None
    schedule_from: int
    batch_from: int
    data_from: int
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline[C: RunConfig]:
    """The phases that a run goes through, in order; the first is the part before all others.

    Args:
        cfg: of the run.
        phases: those that have begun, and those that will. One that the run has left out is not among them.
    """

    cfg: C
    phases: tuple[Phase[C], ...]

    @classmethod
    def of(cls, cfg: C, begun: Sequence[tuple[str, Position]] = ()) -> Timeline[C]:
        """The timeline of a config.

        Args:
            cfg: finalized, or derived with phases of the right form.
            begun: name and place of each phase that has begun; each is one of the config.
        """
        all_phases = [(None, before_phases(cfg)), *phase_configs(cfg)]
        known, last = dict(begun), begun[-1][0] if begun else BASE
        names = [BASE if overlay is None else overlay.name for overlay, _ in all_phases]
        kept = [i for i, name in enumerate(names) if i == 0 or name in known or i > names.index(last)]
        found: list[Phase[C]] = []
        for place, i in enumerate(kept):
            present = all_phases[i][1]
            after = all_phases[kept[place + 1]][0] if place + 1 < len(kept) else None
            between = [one for one, _ in all_phases[kept[place - 1] + 1 : i + 1] if one is not None] if place else []
            started = {
                rule: place if any(one.begins(rule) for one in between) else getattr(found[-1], f"{rule}_from")
                for rule in ("schedule", "batch", "data")
                if place
            }
            start = Position()
            if place:
                start = known.get(names[i]) or cls(cfg, tuple(found))._planned(found[-1])
            found.append(
                Phase(
                    name=names[i],
                    cfg=present,
                    start=start,
                    begins=None if after is None else after.start,
                    schedule_from=started.get("schedule", 0),
                    batch_from=started.get("batch", 0),
                    data_from=started.get("data", 0),
                    changes=tuple(dict.fromkeys(name for one in between for name in one.fields)),
                )
            )
        return cls(cfg, tuple(found))

    def _planned(self, phase: Phase[C]) -> Position:
        """Where the phase after the last one, `phase`, will begin."""
        begins, start = phase.begins, phase.start
        assert begins is not None, "a phase follows"
        if begins.is_reached(start.iteration, start.samples, start.tokens):
            return start
        iteration = begins.count
        if begins.key == "start_samples":
            iteration = self.iteration_at(begins.count)
        elif begins.key == "start_tokens":
            iteration = self.iteration_at(self.samples_at_tokens(begins.count))
        samples = self.samples_at_iteration(iteration)
        return Position(iteration, samples, self.tokens_at(samples), start.data + samples - start.samples)

    def problems(self) -> list[Problem]:
        """Phases that would begin where the one before them does, or earlier, as problems of a config."""
        found = []
        for before, phase in zip(self.phases, self.phases[1:], strict=False):
            begins = before.begins
            if begins is None or phase.start.iteration > before.start.iteration:
                continue
            earlier = "the run" if before.name == BASE else f"phases.{before.name}"
            rule = f"begins at step {phase.start.iteration:,} or before, where {earlier} begins"
            remedy = "Each phase needs a step, and they are written in the order in which they begin."
            fields = (f"phases.{phase.name}.{begins.key}",)
            found.append(Problem(fields=fields, value=begins.count, rule=rule, remedy=remedy))
        return found

    # ---- positions ----

    def present(self, position: Position, begun: Sequence[str], *, may_begin: bool = True) -> int:
        """Index of the phase with which a run goes on.

        Args:
            position: of the run.
            begun: names of the phases that have begun.
            may_begin: false: the phase that has begun last is not left here.
        """
        names = [phase.name for phase in self.phases]
        present = names.index(begun[-1]) if begun else 0
        chosen = self.cfg.checkpoint.enter_phase
        if not may_begin:
            return present
        if chosen in names[present + 1 :]:
            present = names.index(chosen)
        for index in range(len(self.phases) - 1, present, -1):
            begins = self.phases[index - 1].begins
            assert begins is not None, "a phase follows"
            if begins.is_reached(position.iteration, position.samples, position.tokens):
                return index
        return present

    def samples_at_iteration(self, iteration: int) -> int:
        """Samples trained on after that many steps of the run."""
        phase = self._last(lambda start: start.iteration <= iteration)
        batch, done = self._batch(phase)
        steps = iteration - phase.start.iteration
        return phase.start.samples + batch.consumed_after(done + steps) - batch.consumed_after(done)

    def iteration_at(self, samples: float) -> int:
        """Steps until that many samples are trained on."""
        phase = self._last(lambda start: start.samples <= samples)
        batch, done = self._batch(phase)
        since = batch.consumed_after(done) + samples - phase.start.samples
        return phase.start.iteration + batch.step_at(int(since)) - done

    def tokens_at(self, samples: int) -> int:
        """Tokens trained on after that many samples."""
        phase = self._last(lambda start: start.samples <= samples)
        return phase.start.tokens + (samples - phase.start.samples) * phase.cfg.model.seq_length

    def samples_at_tokens(self, tokens: float) -> int:
        """Samples until that many tokens are trained on, rounded up."""
        phase = self._last(lambda start: start.tokens <= tokens)
        return phase.start.samples + -int(-(tokens - phase.start.tokens) // phase.cfg.model.seq_length)

    def end_samples(self) -> int | None:
        """Samples after which the run ends; None: it ends by wall-clock time only."""
        train = self.cfg.train
        ends = [
            self.samples_at_iteration(train.train_iters) if train.train_iters else None,
            train.train_samples,
            self.samples_at_tokens(parse_quantity(train.train_tokens)) if train.train_tokens else None,
        ]
        return min((end for end in ends if end is not None), default=None)

    def end_of_order(self, index: int) -> int | None:
        """Samples of the run after which another order of the data than that of a phase begins, or the run ends."""
        mine = self.phases[index].data_from
        later = [phase.start.samples for phase in self.phases[index:] if phase.data_from != mine]
        return min([*later, *([end] if (end := self.end_samples()) is not None else [])], default=None)

    def _last(self, is_past: Callable[[Position], bool]) -> Phase[C]:
        return next(phase for phase in reversed(self.phases) if is_past(phase.start) or phase is self.phases[0])

    def _batch(self, phase: Phase[C]) -> tuple[BatchSchedule, int]:
        """The batch schedule of a phase, and the steps of it that were done before the phase."""
        batch = BatchSchedule.of(phase.cfg.train)
        return batch, batch.step_at(phase.start.samples - self.phases[phase.batch_from].start.samples)


@dataclass(frozen=True, slots=True)
class ScheduleClock:
    """The clock of a learning-rate schedule in a run with phases: samples of the length at its start.

    While the length of the samples is the same, it counts samples; after that it follows the tokens.

    Args:
        timeline: of the run.
        start: index of the phase with which the schedule begins.
    """

    timeline: Timeline[Any]
    start: int

    @property
    def _first(self) -> Phase[Any]:
        return self.timeline.phases[self.start]

    def at(self, samples: int, tokens: int) -> float:
        """The clock when the run has trained on that much."""
        first = self._first
        if all(phase.cfg.model.seq_length == first.cfg.model.seq_length for phase in self._until(samples)):
            return samples - first.start.samples
        since, length = tokens - first.start.tokens, int(first.cfg.model.seq_length)
        return since // length if since % length == 0 else since / length

    def _until(self, samples: int) -> list[Phase[Any]]:
        """The phases of the schedule that begin before the sample with this number."""
        later = [phase for phase in self.timeline.phases[self.start + 1 :] if phase.start.samples < samples]
        return [self._first, *later]

    def of_iterations(self, iterations: int) -> float:
        """See `Lengths`."""
        return self._of_run(self.timeline.samples_at_iteration(self._first.start.iteration + iterations))

    def of_samples(self, samples: int) -> float:
        """See `Lengths`."""
        return self._of_run(self._first.start.samples + samples)

    def of_tokens(self, tokens: int) -> float:
        """See `Lengths`."""
        return -(-tokens // int(self._first.cfg.model.seq_length))

    def iterations_at(self, clock: float) -> int:
        """See `Lengths`."""
        return self.timeline.iteration_at(self.samples_at(clock)) - self._first.start.iteration

    def end_of_run(self) -> float | None:
        """See `Lengths`."""
        end = self.timeline.end_samples()
        return None if end is None else max(0, self._of_run(end))

    def samples_at(self, clock: float) -> int:
        """Samples of the run at which the clock is reached, rounded up."""
        first = self._first
        return self.timeline.samples_at_tokens(first.start.tokens + clock * first.cfg.model.seq_length)

    def _of_run(self, samples: int) -> float:
        return self.at(samples, self.timeline.tokens_at(samples))
