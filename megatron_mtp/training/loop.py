"""The training loop: restore -> while not done -> fetch -> step -> record -> save or evaluate -> close."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.errors import CheckpointError
from megatron_mtp.observe.metrics import StepRecord
from megatron_mtp.observe.recorder import Recorder
from megatron_mtp.training import schedules
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.evaluation import EvaluationResult, evaluate
from megatron_mtp.training.figures import acceptance_by_depth, acceptance_rates, loss_names, named_losses
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult
from megatron_mtp.training.throughput import Throughput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trainer:
    """One rank of a training run.

    Args:
        run: model, data and groups.
        state: where the run stands; changed in place.
        recorder: figures go there.
        checkpointer: saves; None where nothing is saved.
        callbacks: called in order at each event.
    """

    run: Run
    state: TrainState
    recorder: Recorder
    checkpointer: Checkpointer
    callbacks: list[Callback]
    throughput: Throughput
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    _started_s: float = field(default_factory=time.monotonic)

    def train(self) -> None:
        """Trains to the end of the run, or to where this process is to leave."""
        cfg = self.run.cfg
        self._call("on_train_start")
        if cfg.validation.eval_at_start and self.state.iteration == 0:
            self._evaluate()
        batches = self.run.data.train(self.state.consumed_samples)
        end = schedules.run_length_samples(cfg)
        with _manual_gc(cfg.train.manual_gc), _profiler(cfg) as profiler:
            while end is None or self.state.consumed_samples < end:
                self._step(next(batches))
                profiler.step()
                self._collect_garbage()
                if self._every(cfg.validation.eval_interval):
                    self._evaluate()
                must_leave = self._must_leave()
                if self._every(cfg.checkpoint.save_interval) or must_leave:
                    self._save("interval")
                self._finalize_save()
                if must_leave:
                    break
        batches.close()
        if cfg.validation.eval_at_end and not self._every(cfg.validation.eval_interval):
            self._evaluate()
        self._save("end of training")
        self._finalize_save(blocking=True)
        self._call("on_train_end")

    def _step(self, batch: Any) -> None:
        cfg, state, engine = self.run.cfg, self.state, self.run.engine
        started = time.perf_counter()
        lr, wd = schedules.learning_rate(cfg), schedules.weight_decay(cfg)
        rate = schedules.apply(engine.optimizer, lr, wd, state.consumed_samples)
        loss_factor = LossFactor.parse(cfg.model.mtp_loss_scaling_factor).at(state.consumed_tokens)
        result = engine.train(batch, loss_factor)
        elapsed_s = time.perf_counter() - started

        state.advance(len(batch.sample_ids), cfg.model.seq_length)
        state.elapsed_s += elapsed_s
        state.floating_point_operations += self.throughput.flops(len(batch.sample_ids))
        state.skipped_iterations += not result.updated
        state.nan_iterations += result.has_nan
        state.add_acceptance(acceptance_by_depth(result.acceptance))
        self._call("on_step_end", result)
        self.recorder.step(self._record(result, len(batch.sample_ids), rate, loss_factor, elapsed_s))

    def _record(
        self, result: StepResult, batch_size: int, rate: float, loss_factor: float, elapsed_s: float
    ) -> StepRecord:
        cfg, state = self.run.cfg, self.state
        num_depths = self.run.engine.num_depths
        extra = acceptance_rates(result.acceptance)
        for name, count in zip(loss_names(num_depths), result.depth_counts.tolist(), strict=True):
            extra[f"{name.removesuffix(' loss')}/num_targets"] = count
        if num_depths:
            extra["mtp/loss_scaling_factor"] = loss_factor
        return StepRecord(
            iteration=state.iteration,
            train_iters=cfg.train.train_iters,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            elapsed_ms=elapsed_s * 1e3,
            learning_rate=rate,
            global_batch_size=batch_size,
            losses=named_losses(result.losses, result.router),
            loss_scale=float(self.run.engine.optimizer.get_loss_scale()),
            grad_norm=result.grad_norm,
            num_zeros=result.num_zeros,
            skipped=int(not result.updated),
            nan=int(result.has_nan),
            extra=extra,
            **self.throughput.rates(batch_size, elapsed_s),
        )

    def _evaluate(self) -> None:
        cfg, state = self.run.cfg, self.state
        if not cfg.validation.eval_iters or not self.run.data.valid_names:
            return
        loss_factor = LossFactor.parse(cfg.model.mtp_loss_scaling_factor).at(state.consumed_tokens)
        self.evaluations = evaluate(self.run.engine, self.run.data, loss_factor)
        extra: dict[str, float] = {}
        for callback in self.callbacks:
            extra |= callback.on_evaluation(self.run, state, self.evaluations)
        for index, (name, result) in enumerate(self.evaluations.items()):
            label = "validation" if index == 0 else name
            figures = acceptance_rates(result.acceptance) | (extra if index == 0 else {})
            self.recorder.evaluation(label, state.iteration, named_losses(result.losses, {}), figures)
        main = next(iter(self.evaluations.values())).losses[0]
        if state.best_validation_loss is None or main < state.best_validation_loss:
            state.best_validation_loss = main

    def _save(self, reason: str) -> None:
        """Saves once at an iteration. A save that fails is reported and training goes on: the next may find room."""
        state = self.state
        if self.run.cfg.checkpoint.save is None or self.checkpointer.last_saved == state.iteration:
            return
        self._call("on_save")
        try:
            self.checkpointer.save(self.run.engine.chunks, self.run.engine.optimizer, state, reason)
        except CheckpointError as error:
            logger.error("%s", error)

    def _finalize_save(self, *, blocking: bool = False) -> None:
        try:
            self.checkpointer.maybe_finalize(blocking)
        except CheckpointError as error:
            logger.error("%s", error)

    def _must_leave(self) -> bool:
        """Whether this process is to save and leave before the end; the same answer on every rank."""
        train = self.run.cfg.train
        if self._every(train.exit_interval):
            return True
        if train.exit_duration_in_mins is None:
            return False
        is_late = torch.tensor(
            [time.monotonic() - self._started_s > 60 * train.exit_duration_in_mins],
            dtype=torch.int,
            device=self.run.device.torch_device,
        )
        dist.all_reduce(is_late, op=dist.ReduceOp.MAX)
        return bool(is_late)

    def _every(self, interval: int | None) -> bool:
        return bool(interval) and self.state.iteration % interval == 0

    def _collect_garbage(self) -> None:
        train = self.run.cfg.train
        if train.manual_gc and self._every(train.manual_gc_interval):
            gc.collect()

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.run, self.state, *arguments)


@contextmanager
def _manual_gc(enabled: bool) -> Iterator[None]:
    """Python's collector runs at the same steps on every rank: one that pauses alone makes all others wait."""
    if not enabled:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _NoProfiler:
    def step(self) -> None:
        pass


@contextmanager
def _profiler(cfg: Any) -> Iterator[Any]:
    """torch.profiler over the configured steps on the configured ranks."""
    options = cfg.profiling
    if not options.use_pytorch_profiler or dist.get_rank() not in options.profile_ranks:
        yield _NoProfiler()
        return
    schedule = torch.profiler.schedule(
        wait=max(options.profile_step_start - 1, 0),
        warmup=1 if options.profile_step_start > 0 else 0,
        active=options.profile_step_end - options.profile_step_start,
        repeat=1,
    )
    handler = torch.profiler.tensorboard_trace_handler(options.profile_dir, worker_name=f"rank{dist.get_rank()}")
    with torch.profiler.profile(schedule=schedule, on_trace_ready=handler) as profiler:
        yield profiler
