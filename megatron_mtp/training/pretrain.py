"""`pretrain(cfg)`: the entry point of a run, from Python and from the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.checkpoint.progress import find_phase, read_progress
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.faults import watchdog_timeout_s
from megatron_mtp.config.filled import filled
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import resolve_vocab_size
from megatron_mtp.device.host_memory import keep_freed_memory
from megatron_mtp.device.process_group import env_rank, init_distributed, job_size
from megatron_mtp.errors import DataError, cut
from megatron_mtp.observe.logs import setup_logging
from megatron_mtp.observe.recorder import Recorder, RunInfo
from megatron_mtp.observe.signs import built_in_signs, signs_after_warmup
from megatron_mtp.parallel.resolve import ResolvedRun, resolve_phase
from megatron_mtp.training.autotune import LossFactorTuner
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.callbacks.base import restore
from megatron_mtp.training.callbacks.configured import configured_callbacks
from megatron_mtp.training.callbacks.named import check_callbacks
from megatron_mtp.training.evaluation import EvaluationResult
from megatron_mtp.training.gpt_step import ForwardStep
from megatron_mtp.training.gpt_step import forward_step as default_forward_step
from megatron_mtp.training.guards.faults import FaultWatch
from megatron_mtp.training.guards.node_check import check_nodes
from megatron_mtp.training.guards.out_of_memory import explained_out_of_memory
from megatron_mtp.training.guards.preemption import SignalWatch, StepBoundary
from megatron_mtp.training.guards.watchdog import Watchdog
from megatron_mtp.training.loop import Trainer
from megatron_mtp.training.measurements import Measurements
from megatron_mtp.training.phases import Begun, PhaseBuilder, check_phases
from megatron_mtp.training.run_facts import run_facts
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.setup import Run, leave_groups
from megatron_mtp.training.start_card import log_repeats, start_card
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.throughput import Throughput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of a run, the same on every rank.

    Attributes:
        state: position and counters.
        evaluations: last evaluation of each validation set.
        records: kind of record -> its path or address.
        exit_code: 0, or dist.preempted_exit_code if the run was preempted and is to be started again.
        stop_reason: why the run ended before its configured length; None: it did not.
    """

    state: TrainState
    evaluations: dict[str, EvaluationResult]
    records: dict[str, str]
    exit_code: int = 0
    stop_reason: str | None = None


def pretrain(
    cfg: ConfigContainer,
    forward_step: ForwardStep | None = None,
    *,
    recipe: str = "",
    callbacks: Sequence[Callback] = (),
) -> Summary:
    """Trains as `cfg` says: joins the job that torchrun describes, or runs as one process.

    Args:
        cfg: a recipe's config or your own; it is copied, not changed.
        forward_step: runs one micro-batch through one chunk; None: `gpt_step.forward_step`.
        recipe: name for the records.
        callbacks: called after those that `cfg` asks for; see `Callback`.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written.
        InUseError: another run trains in checkpoint.save.
        NumericsError: the numbers are bad and the policy is to stop.
        NotSavedError: the run came to its end, and its last checkpoint could not be saved.
        OutOfMemoryError: with the planned memory and what each remedy would save.

    While it trains in the main thread, it catches SIGTERM and SIGUSR1: see `guards.preemption`.
    """
    cfg = prepare_config(cfg, job_size())
    checked = check_start(cfg)
    resolved = checked[0]
    callbacks = check_callbacks([*configured_callbacks(cfg), *callbacks])
    setup_logging(env_rank())
    watchdog = Watchdog(watchdog_timeout_s(cfg), env_rank(), resolved.world_size)
    try:
        device = init_distributed(cfg.dist)
        # Refuses before much is built. The run that it waits for may go on to another phase, so the groups come later.
        checkpointer = Checkpointer(resolved.cfg, ProcessGroupCollection(), device.torch_device)
        try:
            forward_step = watchdog.around(forward_step or default_forward_step)
            builder = PhaseBuilder(cfg, checked, device, checkpointer, forward_step)
            state = TrainState()
            begun = builder.first(state)
            with watchdog:  # the groups have made the store that it needs
                return _train(builder, begun, state, recipe, callbacks, watchdog)
        finally:
            checkpointer.release()
    finally:
        leave_groups()


def check_start(cfg: ConfigContainer) -> list[ResolvedRun]:
    """Checks everything that can be known of a run before anything is written: data, folders and layout of each phase.

    Args:
        cfg: finalized for this job, with its vocabulary size.

    Returns:
        The phase in which the run begins or goes on, and those after it.

    Raises:
        ConfigError, DataError, CheckpointError, PlanError: a phase cannot run.
    """
    check_phases(cfg)
    timeline, index = find_phase(cfg, read_progress(cfg.checkpoint.load))
    resolved = [resolve_phase(timeline, one, job_size()) for one in range(index, len(timeline.phases))]
    for one in resolved:
        try:
            check_data(one.cfg)
        except DataError as error:
            if one.phase_index == 0:
                raise
            raise DataError(f"phases.{one.phase.name}: {error}") from error
    check_run_directory(resolved[0].cfg, resolved[0].phase.name)
    return resolved


def prepare_config(cfg: ConfigContainer, world_size: int | None) -> ConfigContainer:
    """A finalized copy, with the vocabulary size taken from the tokenizer where it is not given."""
    cfg = cfg.copy()
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = resolve_vocab_size(cfg)
    return cfg.finalize(world_size)


def _train(
    builder: PhaseBuilder, begun: Begun, state: TrainState, recipe: str, callbacks: list[Callback], watchdog: Watchdog
) -> Summary:
    run, cfg, checkpointer = begun.run, builder.cfg, builder.checkpointer
    device = run.device.torch_device
    if not run.device.is_cuda:
        keep_freed_memory()
    _warn_of_memory(run)
    check_nodes(cfg, device)
    if begun.is_resumed:
        logger.info("so far: %s", state.totals())
        end = run.resolved.length_samples
        if end is not None and state.consumed_samples >= end:
            text = "the run is complete: nothing is left to train. To go on raise train.%s; to evaluate it use `%s`"
            logger.info(text, _length_field(cfg), "megatron-mtp evaluate")
    restore(callbacks, state)
    recorder = _recorder(cfg, run, state, recipe, callbacks)
    _announce(begun, recorder, recipe, state)
    signals = SignalWatch(watchdog.shorten_timeout, state.iteration)
    saver = Saver(run, state, checkpointer)
    trainer = Trainer(
        run=run,
        state=state,
        recorder=recorder,
        saver=saver,
        boundary=StepBoundary(run.cfg, signals, device),
        watch=FaultWatch(run.cfg.train, state),
        watchdog=watchdog,
        callbacks=callbacks,
        throughput=Throughput.of(run.cfg, run.resolved.world_size, run.device.name),
        measurements=Measurements(run.resolved, run.engine.chunks, run.groups, device),
        tuner=_tuner(run, state),
    )
    del run, saver, begun  # the trainer's are those of the present phase
    try:
        with signals:  # before it there is nothing to save, and SIGTERM ends the process
            while True:
                with explained_out_of_memory(trainer.run.resolved, env_rank()):
                    trainer.train()
                if not trainer.ends_phase:
                    break
                watchdog.beat(f"iteration {state.iteration}: building the next phase")
                _announce(_go_on(builder, trainer), recorder, recipe, state)
        recorder.end(_end_text(trainer))
    except Exception as error:  # whatever it was, the log says so before it is raised again
        recorder.end(f"ended by {type(error).__name__}: {cut(str(error))}")
        raise
    finally:
        for close in [callback.close for callback in callbacks] + [recorder.close, checkpointer.close, trainer.close]:
            close()
    logger.info("in total: %s", state.totals())
    trainer.saver.check_end(trainer.stop_reason)
    if trainer.is_preempted:  # torchrun's own exit code does not show it
        came = "to another rank" if signals.came_after is None else f"after iteration {signals.came_after}"
        saved = "a" if checkpointer.last_saved == state.iteration else "no"
        text = "SIGTERM came %s; left after iteration %d with %s checkpoint, exit code %d (dist.preempted_exit_code)"
        logger.info(text, came, state.iteration, saved, cfg.dist.preempted_exit_code)
    elif trainer.stop_reason is not None:
        logger.info("left after iteration %d: %s", state.iteration, trainer.stop_reason)
    exit_code = cfg.dist.preempted_exit_code if trainer.is_preempted else 0
    return Summary(state, trainer.evaluations, dict(recorder.places), exit_code, trainer.stop_reason)


def _tuner(run: Run, state: TrainState) -> LossFactorTuner | None:
    """What changes the loss factor, if anything does, as it was when the checkpoint was written."""
    kept = state.health.pop("autotune", {})
    if not run.cfg.train.mtp_autotune:
        return None
    tuner = LossFactorTuner(run.resolved.depths.count)
    tuner.load_state_dict(kept)
    return tuner


def _go_on(builder: PhaseBuilder, trainer: Trainer) -> Begun:
    """Builds the next phase and hands it to the trainer."""
    state = trainer.state
    begun = builder.next(trainer.run, state)
    run = begun.run
    _warn_of_memory(run)
    trainer.enter(
        run,
        Saver(run, state, builder.checkpointer),
        FaultWatch(run.cfg.train, state),
        Throughput.of(run.cfg, run.resolved.world_size, run.device.name),
        Measurements(run.resolved, run.engine.chunks, run.groups, run.device.torch_device),
        _tuner(run, state),
    )
    return begun


def _announce(begun: Begun, recorder: Recorder, recipe: str, state: TrainState) -> None:
    """The table with which this process, or a phase, starts."""
    run = begun.run
    if begun.text is not None:
        recorder.message(begun.text, kind="phase", iteration=state.iteration)
    recorder.message(start_card(run, recipe, state.iteration), kind="start card", iteration=state.iteration)
    log_repeats(run.data)


def _end_text(trainer: Trainer) -> str:
    """How a run ended, for its records."""
    if trainer.is_preempted:
        return "preempted: it received SIGTERM and is to be started again"
    return "complete" if trainer.stop_reason is None else f"left: {trainer.stop_reason}"


def _length_field(cfg: ConfigContainer) -> str:
    """The field of `train` that gives the length of the run."""
    names = ("train_iters", "train_samples", "train_tokens")
    return next(name for name in names if getattr(cfg.train, name) is not None)


def _recorder(cfg: ConfigContainer, run: Run, state: TrainState, recipe: str, callbacks: list[Callback]) -> Recorder:
    """Opens the records of the run, or continues those of the run that it resumes.

    Args:
        cfg: with all phases.
        run: of the present phase.
    """
    info = RunInfo(
        recipe=recipe,
        iteration=state.iteration,
        train_iters=cfg.train.train_iters,
        world_size=run.resolved.world_size,
        device=run.device.name,
        config=to_dict(run.cfg) | {"phases": to_dict(cfg)["phases"]},
        extra=run_facts(run.resolved, is_cpu=not run.device.is_cuda) if dist.get_rank() == 0 else {},
    )
    signs = built_in_signs(run.resolved.depths.count)
    signs |= signs_after_warmup(filled(cfg.model.vocab_size), run.resolved.learning_rate.warmup)
    for callback in callbacks:
        signs |= callback.health_signs()
    kept = {"wandb_run_id": state.wandb_run_id, "signs": state.health.get("signs", {})}
    recorder = Recorder(cfg, info, dist.get_rank() == 0, kept, signs)
    state.wandb_run_id = recorder.state().get("wandb_run_id")
    return recorder


def _warn_of_memory(run: Run) -> None:
    """Says so where by estimate the planner's choice does not fit its device."""
    found = run.resolved.planned
    if found is not None and not found.fits:
        text = "by estimate no split fits the memory of %s; this is the fastest. `megatron-mtp plan` shows each stage."
        logger.warning(text, found.machine.name)
