"""The training loop: restore -> while not done -> fetch -> step -> record -> save or evaluate -> close."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Any

from megatron_mtp.config.blend import set_label
from megatron_mtp.config.depths import loss_names
from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.errors import LostDataError
from megatron_mtp.observe.metrics import StepRecord, columns, scalars
from megatron_mtp.observe.recorder import Recorder
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.callbacks.base import restore
from megatron_mtp.training.callbacks.events import call_event
from megatron_mtp.training.evaluation import EvaluationResult, evaluate
from megatron_mtp.training.guards.attribution import locate
from megatron_mtp.training.guards.data_errors import agreed
from megatron_mtp.training.guards.faults import Action, FaultWatch, decide, policy_of
from megatron_mtp.training.guards.preemption import Decision, StepBoundary
from megatron_mtp.training.guards.repeats import Repeats
from megatron_mtp.training.guards.watchdog import Watchdog
from megatron_mtp.training.optimizer import apply_schedules
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult
from megatron_mtp.training.throughput import Throughput

RETRY_S = (5.0, 30.0)
"""Pauses before the last checkpoint of a run is tried again; together short enough for the time after a SIGTERM."""


def built_in_names(record: StepRecord) -> set[str]:
    """Names of all built-in metrics of a step, with those that this step does not have."""
    return {column.name for column in columns(record)} | scalars(record).keys()


@dataclass(slots=True)
class Trainer:
    """One rank of a training run.

    Args:
        run: model, data and groups.
        state: position of the run; changed in place.
        recorder: takes the metrics.
        saver: writes checkpoints, where the run has any.
        boundary: decides after each step whether to save or leave.
        watch: judges losses and gradient of each step.
        watchdog: gets a heartbeat before everything that may take long.
        callbacks: called in this order at each event.
    """

    run: Run
    state: TrainState
    recorder: Recorder
    saver: Saver
    boundary: StepBoundary
    watch: FaultWatch
    watchdog: Watchdog
    callbacks: list[Callback]
    throughput: Throughput
    spikes: Repeats = field(default_factory=Repeats)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    is_preempted: bool = False
    """The process left because of a signal and is to be started again."""
    stop_reason: str | None = None
    """Why the run left before its end; None: it did not."""

    def train(self) -> None:
        """Trains to the end of the run, or to where this process is to leave.

        Raises:
            LostDataError: on every rank, after a checkpoint: some rank can no longer read its data.
            NumericsError: on every rank: the numbers are bad and the policy is to stop.
            ReplicaError: on every rank: replicas of the weights differ.
        """
        try:
            self._start()
            decision = self._train_steps()
            self.is_preempted, self.stop_reason = decision.is_preempted, decision.leave
            self._end()
        except LostDataError:  # between two steps
            if self.state.iteration:
                self.saver.announce_end()
                self._save_the_end("data cannot be read")
            raise

    def _train_steps(self) -> Decision:
        """Trains until the run has its length or all ranks decide to leave."""
        state, end = self.state, self.run.resolved.length_samples
        batches = self._batches()
        decision = Decision()
        while decision.leave is None and (end is None or state.consumed_samples < end):
            self.watchdog.beat(f"iteration {state.iteration + 1}: the next batch")
            batch = next(batches)
            if self._step(batch) == "roll back":
                batches.close()
                self._roll_back(batch)
                batches = self._batches()
            else:
                decision = self._evaluate_and_save()
        batches.close()
        return decision

    def _batches(self) -> Generator[GlobalBatch]:
        """The batches of the steps to come."""
        return agreed(self.run.data.train(self.state.data_position), self.run.device.torch_device)

    def _start(self) -> None:
        """Evaluates and saves before the first step of a run, where the config asks for it."""
        cfg = self.run.cfg
        self._call("on_train_start")
        if cfg.validation.eval_at_start and self.state.iteration == 0:
            self._evaluate()
        if "rollback" in (cfg.train.on_nan, cfg.train.on_spike) and self.state.iteration == 0:
            self._save("a checkpoint to roll back to")

    def _evaluate_and_save(self) -> Decision:
        """What follows a step: evaluation and checkpoint where they are due, and whether all ranks leave."""
        iteration = self.state.iteration
        if self._every(self.run.cfg.validation.eval_interval):
            self._evaluate()
        self.watchdog.beat(f"iteration {iteration}: agreeing with all ranks whether to save or leave")
        decision = self.boundary.decide(iteration, self.run.stop_reason)
        self.watchdog.restore_timeout()
        if decision.leave:
            self.saver.announce_end()
        if decision.save:
            self._save(decision.save)
        self.saver.finalize()
        return decision

    def _end(self) -> None:
        validation = self.run.cfg.validation
        if validation.eval_at_end and not self._every(validation.eval_interval) and not self.is_preempted:
            self._evaluate()
        self._tell(self.spikes.end())
        self.saver.announce_end()
        self._save_the_end()
        self._call("on_train_end")

    def _save_the_end(self, reason: str = "end of training") -> None:
        """Saves where the run ends, and tries again if that fails: someone may make room, or a server come back."""
        self.saver.finalize(blocking=True)
        for pause_s in RETRY_S if self.saver.has_tried else (0.0, *RETRY_S):
            if not self.saver.is_due:
                return
            self.watchdog.beat(f"iteration {self.state.iteration}: waiting before the last checkpoint is tried again")
            time.sleep(pause_s)
            self._save(reason)
            self.saver.finalize(blocking=True)

    def _step(self, batch: GlobalBatch) -> Action:
        """One step, counted and recorded unless the run goes back because of it."""
        cfg, state, engine = self.run.cfg, self.state, self.run.engine
        self.watchdog.beat(f"iteration {state.iteration + 1}: the step")
        started = time.perf_counter()
        resolved, samples = self.run.resolved, state.consumed_samples
        rate = apply_schedules(engine.optimizer, resolved.learning_rate, resolved.weight_decay, samples)
        loss_factor = resolved.loss_factor.at(state.consumed_tokens)
        result = engine.train(batch, loss_factor, self.watch)
        elapsed_s = time.perf_counter() - started

        state.elapsed_s += elapsed_s
        state.floating_point_operations += self.throughput.flops(len(batch.sample_ids))
        state.skipped_iterations += not result.updated
        state.nan_iterations += result.has_nan
        if self._judge(batch, result) == "roll back":
            return "roll back"
        state.advance(len(batch.sample_ids), cfg.model.seq_length)
        state.add_acceptance(result.acceptance_by_depth())
        record = self._record(result, len(batch.sample_ids), rate, loss_factor, elapsed_s)
        record.metrics = self._call("on_step_end", result, taken=built_in_names(record))
        self.recorder.step(record)
        return "continue"

    def _judge(self, batch: GlobalBatch, result: StepResult) -> Action:
        """Reports a fault and says what follows from it."""
        iteration = self.state.iteration + 1
        if result.fault is None:
            self.state.skips_in_row = 0
            self._tell(self.spikes.quiet(iteration))
            return "continue"
        place = f"step of {len(batch.sample_ids)} samples"
        if result.fault.kind == "nan":
            place = locate(self.run.groups, self.run.engine.gradients, batch, result)
        action, report = decide(result.fault, self.run.cfg.train, self.state, place)
        # Other policies end by themselves, after skip_limit or rollback_limit steps.
        is_reported = policy_of(result.fault, self.run.cfg.train) == "report"
        shown = self.spikes.add(iteration, report) if is_reported else report
        self.recorder.message(shown or report, kind="fault", iteration=iteration, is_repeat=shown is None)
        return action

    def _tell(self, text: str | None) -> None:
        if text is not None:
            self.recorder.message(text)

    def _roll_back(self, batch: GlobalBatch) -> None:
        """Goes back to the last checkpoint; the data continues after this batch."""
        self.saver.roll_back(len(batch.sample_ids))
        restore(self.callbacks, self.state)
        self.recorder.roll_back(self.state.iteration, self.state.health.get("signs"))

    def _record(
        self, result: StepResult, batch_size: int, rate: float, loss_factor: float, elapsed_s: float
    ) -> StepRecord:
        cfg, state = self.run.cfg, self.state
        num_depths = self.run.engine.objective.num_depths
        extra = result.acceptance_rates() | self.saver.metrics()
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
            losses=result.named_losses(),
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
        self.watchdog.beat(f"iteration {state.iteration}: evaluation")
        loss_factor = self.run.resolved.loss_factor.at(state.consumed_tokens)
        self.evaluations = evaluate(self.run.engine, self.run.data, loss_factor)
        first = next(iter(self.evaluations.values()))
        taken = {*first.named_losses(), "lm loss ppl", *first.acceptance_rates()}
        of_callbacks: dict[str, float] = {}
        losses: dict[str, float] = {}
        try:
            of_callbacks = self._call("on_evaluation", self.evaluations, taken=taken)
        finally:  # the evaluation is recorded even if a callback fails
            for name, result in self.evaluations.items():
                metrics = result.acceptance_rates() | (of_callbacks if result is first else {})
                label = set_label(name)
                self.recorder.evaluation(label, state.iteration, result.named_losses(), metrics)
                losses |= {f"{label}/{loss}": value for loss, value in result.valid_losses().items()}
        if self.saver.evaluated(first.losses[0], losses) and cfg.checkpoint.keep_best:
            self._save("lowest validation loss")

    def _save(self, reason: str) -> None:
        if not self.saver.is_due:
            return
        self.watchdog.beat(f"iteration {self.state.iteration}: saving ({reason})")
        self._call("on_save")
        if signs := self.recorder.state().get("signs"):  # on the rank that writes
            self.state.health["signs"] = signs
        self.state.callbacks |= {callback.name: kept for callback in self.callbacks if (kept := callback.state_dict())}
        if self.saver.save(reason):
            self.boundary.saved()

    def _every(self, interval: int | None) -> bool:
        return interval is not None and self.state.iteration % interval == 0

    def _call(self, event: str, *arguments: Any, taken: Collection[str] = ()) -> dict[str, float]:
        """Calls an event of every callback; see `call_event`."""
        return call_event(self.callbacks, event, self.run, self.state, *arguments, taken=taken)
