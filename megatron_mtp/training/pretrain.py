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
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import resolve_vocab_size
from megatron_mtp.device.process_group import env_rank, job_size
from megatron_mtp.observe.health import SIGNS
from megatron_mtp.observe.logs import setup_logging
from megatron_mtp.observe.recorder import Recorder, RunInfo
from megatron_mtp.parallel.resolve import ResolvedRun, resolve
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.callbacks.base import restore, unique
from megatron_mtp.training.callbacks.configured import configured_callbacks
from megatron_mtp.training.evaluation import EvaluationResult
from megatron_mtp.training.gpt_step import ForwardStep
from megatron_mtp.training.gpt_step import forward_step as default_forward_step
from megatron_mtp.training.guards.faults import FaultWatch
from megatron_mtp.training.guards.node_check import check_nodes
from megatron_mtp.training.guards.out_of_memory import explained_out_of_memory
from megatron_mtp.training.guards.preemption import SignalWatch, StepBoundary
from megatron_mtp.training.guards.watchdog import Watchdog
from megatron_mtp.training.loop import Trainer
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.setup import Run, leave_groups, setup
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
        callbacks: called after the built-in ones that `cfg` asks for; see `Callback`.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written.
        NumericsError: the numbers are bad and the policy is to stop.
        OutOfMemoryError: with the planned memory and what each remedy would save.

    While it trains in the main thread, it catches SIGTERM and SIGUSR1: see `guards.preemption`.
    """
    cfg = prepare_config(cfg, job_size())
    resolved = resolve(cfg, job_size())
    check_data(cfg)
    check_run_directory(cfg)
    callbacks = unique([*configured_callbacks(resolved.cfg), *callbacks])
    setup_logging(env_rank())
    try:
        with explained_out_of_memory(resolved, env_rank()):
            return _train(resolved, forward_step, recipe, callbacks)
    finally:
        leave_groups()


def prepare_config(cfg: ConfigContainer, world_size: int | None) -> ConfigContainer:
    """A finalized copy, with the vocabulary size taken from the tokenizer where it is not given."""
    cfg = cfg.copy()
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = resolve_vocab_size(cfg)
    cfg.finalize(world_size)
    return cfg


def _train(
    resolved: ResolvedRun,
    forward_step: ForwardStep | None,
    recipe: str,
    callbacks: list[Callback],
) -> Summary:
    watchdog = Watchdog(watchdog_timeout_s(resolved.cfg), env_rank(), resolved.world_size)
    run = setup(resolved, watchdog.around(forward_step or default_forward_step))
    with watchdog:  # from here on there is a store for all ranks
        return _train_watched(run, recipe, callbacks, watchdog)


def _train_watched(
    run: Run,
    recipe: str,
    callbacks: list[Callback],
    watchdog: Watchdog,
) -> Summary:
    cfg = run.cfg
    _log_plan(run)
    check_nodes(cfg, run.device.torch_device)
    state = TrainState()
    checkpointer = Checkpointer(cfg, run.groups, run.device.torch_device)
    if not checkpointer.resume(run.engine.chunks, run.engine.optimizer, state):
        checkpointer.start_from_pretrained(run.engine.chunks, run.engine.optimizer)
    restore(callbacks, state)
    info = RunInfo(
        recipe=recipe,
        iteration=state.iteration,
        train_iters=cfg.train.train_iters,
        world_size=dist.get_world_size(),
        device=run.device.name,
        config=to_dict(cfg),
    )
    signs = SIGNS | {name: sign for callback in callbacks for name, sign in callback.health_signs().items()}
    recorder = Recorder(cfg, info, dist.get_rank() == 0, {"wandb_run_id": state.wandb_run_id}, signs)
    state.wandb_run_id = recorder.state().get("wandb_run_id")
    signals = SignalWatch(watchdog.shorten_timeout)
    signals.steps_done = state.iteration
    throughput = Throughput.of(cfg, dist.get_world_size(), run.device.name)
    trainer = Trainer(
        run=run,
        state=state,
        recorder=recorder,
        saver=Saver(run, state, checkpointer),
        boundary=StepBoundary(cfg, signals, run.device.torch_device),
        watch=FaultWatch(cfg.train, state),
        watchdog=watchdog,
        callbacks=callbacks,
        throughput=throughput,
    )
    try:
        with signals:  # before it there is nothing to save, and SIGTERM ends the process
            trainer.train()
    finally:
        for callback in callbacks:
            callback.close()
        recorder.close()
        checkpointer.close()
        run.data.close()
    exit_code = cfg.dist.preempted_exit_code if trainer.is_preempted else 0
    if trainer.is_preempted:  # torchrun's own exit code does not show it
        came = "to another rank" if signals.came_after is None else f"after iteration {signals.came_after}"
        saved = "a" if checkpointer.last_saved == state.iteration else "no"
        logger.info(
            "SIGTERM came %s; left after iteration %d with %s checkpoint, exit code %d (dist.preempted_exit_code)",
            came,
            state.iteration,
            saved,
            exit_code,
        )
    elif trainer.stop_reason is not None:
        logger.info("left after iteration %d: %s", state.iteration, trainer.stop_reason)
    return Summary(state, trainer.evaluations, dict(recorder.places), exit_code, trainer.stop_reason)


def _log_plan(run: Run) -> None:
    """Logs the planner's choice and what it did not know."""
    found = run.resolved.planned
    if found is None:
        return
    name = found.machine.name
    logger.info("pipeline layout %s, planned for %s (dist.hardware)", found.layout.string, name)
    if not found.fits:
        logger.warning(
            "no split fits the memory of %s by estimate; this is the fastest one. `megatron-mtp plan` shows each "
            "stage.",
            name,
        )
    if name not in run.device.name.lower():
        logger.info(
            "this device is %s: dist.hardware names what to plan for, or `megatron-mtp profile` measures it for "
            "`plan --profile`",
            run.device.name,
        )
