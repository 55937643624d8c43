"""Builds the run of each phase, and takes it from one to the next: a checkpoint and a resume within the process.

A run that goes on by itself, one that is stopped where a phase ends, and one that is killed anywhere do the same thing
here, so they train the same model.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass

import torch

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.checkpoint.agreement import run_on_rank_0
from megatron_mtp.checkpoint.changes import phase_changes
from megatron_mtp.checkpoint.progress import Progress, find_phase, read_progress
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.device.process_group import env_rank, job_size
from megatron_mtp.device.select import Device
from megatron_mtp.errors import ConfigError, Problem, shown
from megatron_mtp.parallel.resolve import ResolvedRun, resolve_phase
from megatron_mtp.training.gpt_step import ForwardStep
from megatron_mtp.training.guards.out_of_memory import explained_out_of_memory
from megatron_mtp.training.setup import Run, build, make_groups, seed_generators
from megatron_mtp.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """What `PhaseBuilder` has made.

    Args:
        is_resumed: from a checkpoint.
        text: what begins here, for the records; None: the phase had begun before.
    """

    run: Run
    is_resumed: bool
    text: str | None


def check_phases(cfg: ConfigContainer) -> None:
    """Refuses a run with phases that cannot save.

    Raises:
        ConfigError: checkpoint.save is not set.
    """
    if cfg.phases and cfg.checkpoint.save is None:
        rule = f"a run goes from one phase to the next by a checkpoint, and it has phases: {', '.join(cfg.phases)}"
        remedy = "Set it, or take the phases away with phases=null."
        raise ConfigError(Problem(fields=("checkpoint.save",), value=None, rule=rule, remedy=remedy))


@dataclass(slots=True)
class PhaseBuilder:
    """Builds the run of a phase on this rank, which has joined the job, and fills it from the newest checkpoint.

    Args:
        cfg: finalized, with all phases.
        checked: the phases that were resolved for the check before the start.
        checkpointer: of the run; holds the lock of checkpoint.save.
        forward_step: runs one micro-batch through one chunk.
    """

    cfg: ConfigContainer
    checked: list[ResolvedRun]
    device: Device
    checkpointer: Checkpointer
    forward_step: ForwardStep

    def first(self, state: TrainState) -> Begun:
        """The phase in which this process begins; `state` gets what the checkpoint of checkpoint.load holds.

        Raises:
            CheckpointError: on every rank: as `Checkpointer.resume`, or `find_phase`.
        """
        return self._begin(state, run_on_rank_0(lambda: read_progress(self.cfg.checkpoint.load)), is_own=False)

    def next(self, run: Run, state: TrainState) -> Begun:
        """The phase that begins after `run`, which is taken down; its last checkpoint is complete.

        Raises:
            CheckpointError: on every rank: as `Checkpointer.load_own`, or `find_phase`.
        """
        self._take_down(run)
        return self._begin(state, Progress.of(state), is_own=True)

    def _begin(self, state: TrainState, progress: Progress, *, is_own: bool) -> Begun:
        while True:
            resolved = self._resolve(progress)
            with explained_out_of_memory(resolved, env_rank()):
                run = self._build(resolved)
                is_resumed = self._load(run, state, is_own=is_own)
            found = Progress.of(state)
            if find_phase(self.cfg, found) == (resolved.timeline, resolved.phase_index):
                return Begun(run, is_resumed, self._enter(run, state))
            self._take_down(run)  # the newest checkpoint was damaged, and the one before it is of another phase
            progress = found

    def _resolve(self, progress: Progress) -> ResolvedRun:
        """The phase in which the run goes on, resolved for this job."""
        timeline, index = find_phase(self.cfg, progress)
        known = (one for one in self.checked if (one.timeline, one.phase_index) == (timeline, index))
        return next(known, None) or resolve_phase(timeline, index, job_size())

    def _build(self, resolved: ResolvedRun) -> Run:
        groups = make_groups(resolved)
        seed_generators(resolved.cfg, groups)
        self.checkpointer.enter(resolved.cfg, groups, resolved.phase.name)
        return build(resolved, self.device, groups, self.forward_step)

    def _load(self, run: Run, state: TrainState, *, is_own: bool) -> bool:
        engine, state.phases = run.engine, []
        if is_own:
            self.checkpointer.load_own(engine.chunks, engine.optimizer, state)
            return True
        if self.checkpointer.resume(engine.chunks, engine.optimizer, state):
            return True
        self.checkpointer.start_from_pretrained(engine.chunks, engine.optimizer)
        return False

    def _enter(self, run: Run, state: TrainState) -> str | None:
        """Adds the phase to the history if it begins here, and says so."""
        phase = run.resolved.phase
        if run.resolved.phase_index == 0 or phase.name in [name for name, _ in state.begun]:
            return None
        changes = phase_changes(self.checkpointer.resumed_config, to_dict(run.cfg), phase.changes)
        state.begin_phase(phase.name, changes)
        listed = ", ".join(f"{field} {shown(old)} -> {shown(new)}" for field, (old, new) in changes.items())
        place = f"after iteration {state.iteration:,}, {state.consumed_tokens:,} tokens"
        return f"phase {phase.name} begins {place}: {listed or 'nothing changes'}"

    def _take_down(self, run: Run) -> None:
        run.release()
        run.drop()
        gc.unfreeze()  # else what `GarbageCollection` has frozen, the old model among it, would stay
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()
