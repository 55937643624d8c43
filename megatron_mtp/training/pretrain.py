"""`pretrain(cfg)`: the entry point of a run, from Python and from the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.checkpoint.preflight import check_run_directory
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.faults import watchdog_timeout_s
from megatron_mtp.config.filled import filled
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import resolve_vocab_size
from megatron_mtp.device.process_group import env_rank, job_size
from megatron_mtp.errors import cut
from megatron_mtp.observe.logs import setup_logging
from megatron_mtp.observe.recorder import Recorder, RunInfo
from megatron_mtp.observe.signs import built_in_signs, signs_after_warmup
from megatron_mtp.parallel.resolve import resolve
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
from megatron_mtp.training.run_facts import run_facts
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.setup import Run, build, join_groups, leave_groups
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
    resolved = resolve(prepare_config(cfg, job_size()), job_size())
    check_data(resolved.cfg)
    check_run_directory(resolved.cfg)
    callbacks = check_callbacks([*configured_callbacks(resolved.cfg), *callbacks])
    setup_logging(env_rank())
    watchdog = Watchdog(watchdog_timeout_s(resolved.cfg), env_rank(), resolved.world_size)
    try:
        with explained_out_of_memory(resolved, env_rank()):
            device, groups = join_groups(resolved)
            checkpointer = Checkpointer(resolved.cfg, groups, device.torch_device)  # refuses before much is built
            try:
                run = build(resolved, device, groups, watchdog.around(forward_step or default_forward_step))
                with watchdog:  # the groups have made the store that it needs
                    return _train(run, checkpointer, recipe, callbacks, watchdog)
            finally:
                checkpointer.release()
    finally:
        leave_groups()


def prepare_config(cfg: ConfigContainer, world_size: int | None) -> ConfigContainer:
    """A finalized copy, with the vocabulary size taken from the tokenizer where it is not given."""
    cfg = cfg.copy()
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = resolve_vocab_size(cfg)
    return cfg.finalize(world_size)


def _train(run: Run, checkpointer: Checkpointer, recipe: str, callbacks: list[Callback], watchdog: Watchdog) -> Summary:
    cfg, device = run.cfg, run.device.torch_device
    _warn_of_memory(run)
    check_nodes(cfg, device)
    state = TrainState()
    if checkpointer.resume(run.engine.chunks, run.engine.optimizer, state):
        logger.info("so far: %s", state.totals())
        end = run.resolved.length_samples
        if end is not None and state.consumed_samples >= end:
            text = "the run is complete: nothing is left to train. To go on raise train.%s; to evaluate it use `%s`"
            logger.info(text, _length_field(cfg), "megatron-mtp evaluate")
    else:
        checkpointer.start_from_pretrained(run.engine.chunks, run.engine.optimizer)
    restore(callbacks, state)
    recorder = _recorder(run, state, recipe, callbacks)
    recorder.message(start_card(run, recipe, state.iteration), kind="start card")
    log_repeats(run.data)
    signals = SignalWatch(watchdog.shorten_timeout, state.iteration)
    saver = Saver(run, state, checkpointer)
    trainer = Trainer(
        run=run,
        state=state,
        recorder=recorder,
        saver=saver,
        boundary=StepBoundary(cfg, signals, device),
        watch=FaultWatch(cfg.train, state),
        watchdog=watchdog,
        callbacks=callbacks,
        throughput=Throughput.of(cfg, run.resolved.world_size, run.device.name),
        measurements=Measurements(run.resolved, run.engine.chunks, run.groups, device),
        tuner=_tuner(run, state),
    )
    try:
        with signals:  # before it there is nothing to save, and SIGTERM ends the process
            trainer.train()
        recorder.end(_end_text(trainer))
    except Exception as error:  # whatever it was, the log says so before it is raised again
        recorder.end(f"ended by {type(error).__name__}: {cut(str(error))}")
        raise
    finally:
        for close in [callback.close for callback in callbacks] + [recorder.close, checkpointer.close, run.data.close]:
            close()
    logger.info("in total: %s", state.totals())
    saver.check_end(trainer.stop_reason)
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


def _end_text(trainer: Trainer) -> str:
    """How a run ended, for its records."""
    if trainer.is_preempted:
        return "preempted: it received SIGTERM and is to be started again"
    return "complete" if trainer.stop_reason is None else f"left: {trainer.stop_reason}"


def _length_field(cfg: ConfigContainer) -> str:
    """The field of `train` that gives the length of the run."""
    names = ("train_iters", "train_samples", "train_tokens")
    return next(name for name in names if getattr(cfg.train, name) is not None)


def _recorder(run: Run, state: TrainState, recipe: str, callbacks: list[Callback]) -> Recorder:
    """Opens the records of the run, or continues those of the run that it resumes."""
    info = RunInfo(
        recipe=recipe,
        iteration=state.iteration,
        train_iters=run.cfg.train.train_iters,
        world_size=run.resolved.world_size,
        device=run.device.name,
        config=to_dict(run.cfg),
        extra=run_facts(run.resolved, is_cpu=not run.device.is_cuda) if dist.get_rank() == 0 else {},
    )
    signs = built_in_signs(run.resolved.depths.count)
    signs |= signs_after_warmup(filled(run.cfg.model.vocab_size), run.resolved.learning_rate.warmup)
    for callback in callbacks:
        signs |= callback.health_signs()
    kept = {"wandb_run_id": state.wandb_run_id, "signs": state.health.get("signs", {})}
    recorder = Recorder(run.cfg, info, dist.get_rank() == 0, kept, signs)
    state.wandb_run_id = recorder.state().get("wandb_run_id")
    return recorder


def _warn_of_memory(run: Run) -> None:
    """Says so where by estimate the planner's choice does not fit its device."""
    found = run.resolved.planned
    if found is not None and not found.fits:
        text = "by estimate no split fits the memory of %s; this is the fastest. `megatron-mtp plan` shows each stage."
        logger.warning(text, found.machine.name)
