"""The training loop: restore -> while not done -> fetch -> step -> record -> save or evaluate -> close."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import record_function

from megatron_mtp.config.blend import set_label
from megatron_mtp.data.batch import GlobalBatch
from megatron_mtp.errors import LostDataError, StoppedEvaluationError
from megatron_mtp.observe.recorder import Recorder
from megatron_mtp.training.autotune import LossFactorTuner
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.callbacks.base import restore
from megatron_mtp.training.callbacks.events import call_event
from megatron_mtp.training.evaluation import BetweenBatches, EvaluationResult, evaluate
from megatron_mtp.training.guards.attribution import locate
from megatron_mtp.training.guards.data_errors import agreed
from megatron_mtp.training.guards.faults import Action, FaultWatch, decide, policy_of
from megatron_mtp.training.guards.preemption import Decision, StepBoundary
from megatron_mtp.training.guards.repeats import Repeats
from megatron_mtp.training.guards.watchdog import Watchdog
from megatron_mtp.training.measurements import Measurements
from megatron_mtp.training.optimizer import apply_schedules
from megatron_mtp.training.saving import Saver
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult
from megatron_mtp.training.step_record import built_in_names, step_record
from megatron_mtp.training.throughput import Throughput

logger = logging.getLogger(__name__)

RETRY_S = (5.0, 30.0)
"""Pauses before the last checkpoint of a run is tried again; together short enough for the time after a SIGTERM."""


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
        throughput: turns times into rates.
        measurements: what is measured in some steps only.
        tuner: changes the loss factor; None: it is the schedule's.
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
    measurements: Measurements
    tuner: LossFactorTuner | None = None
    spikes: Repeats = field(default_factory=Repeats)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    is_preempted: bool = False
    """The process left because of a signal and is to be started again."""
    stop_reason: str | None = None
    """Why the run left before its end; None: it did not."""
    ends_phase: bool = False
    """`train` returned since the next phase begins here; the checkpoint with which it does is complete."""

    def close(self) -> None:
        """Ends the threads that read data."""
        self.run.data.close()

    def train(self) -> None:
        """Trains to the end of the phase or of the run, or to where this process is to leave.

        Raises:
            NotSavedError: on every rank: the checkpoint with which the next phase begins cannot be saved.
            LostDataError: on every rank, after a checkpoint: some rank can no longer read its data.
            NumericsError: on every rank: the numbers are bad and the policy is to stop.
            ReplicaError: on every rank: replicas of the weights differ.
        """
        try:
            decision = self._train_steps(self._start())
            self.ends_phase = decision.leave is None and not self._is_complete()
            if self.ends_phase:
                self._end_phase()
                return
            decision = self._end(decision)
            self.is_preempted, self.stop_reason = decision.is_preempted, decision.leave
        except LostDataError:  # between two steps
            if self.state.iteration:
                self.saver.announce_end()
                self._save_the_end("data cannot be read")
            raise

    def _train_steps(self, decision: Decision) -> Decision:
        """Trains until the run has its length or all ranks decide to leave, which they may have done before."""
        state = self.state
        batches = self._batches()
        while decision.leave is None and not self._is_over():
            self.watchdog.beat(f"iteration {state.iteration + 1}: the next batch")
            with record_function("data"):
                batch, data_s = next(batches)
            if self._step(batch, data_s) == "roll back":
                batches.close()
                self._roll_back(batch)
                batches = self._batches()
            else:
                decision = self._evaluate_and_save()
        batches.close()
        return decision

    def _is_complete(self) -> bool:
        """Whether the run has its length."""
        end = self.run.resolved.length_samples
        return end is not None and self.state.consumed_samples >= end

    def _is_over(self) -> bool:
        """Whether the run has its length, or the next phase begins."""
        begins, at = self.run.resolved.phase.begins, self.state.position
        return self._is_complete() or (begins is not None and begins.is_reached(at.iteration, at.samples, at.tokens))

    def _batches(self) -> Generator[tuple[GlobalBatch, float]]:
        """The batches of the steps to come, each with the seconds that the slowest rank waited for its data."""
        resolved, read = self.run.resolved, self.state.data_position
        batches = self.run.data.train(read - resolved.data_start, read - resolved.batch_start)
        return agreed(batches, self.run.device.torch_device)

    def _start(self) -> Decision:
        """Evaluates and saves before the first step of a run, where the config asks for it.

        A resumed run first repeats what follows a step, if a signal came in the evaluation of the last one. Signals
        that came while a phase was built are noticed here.
        """
        cfg, state, decision = self.run.cfg, self.state, Decision()
        self._call("on_train_start")
        if self.ends_phase:
            self.ends_phase = False
            return self._decide()
        if state.iteration > 0:
            return self._evaluate_and_save() if state.has_open_evaluation else decision
        state.has_open_evaluation = False
        if cfg.validation.eval_at_start and not self._evaluate():
            decision = self._decide()
        if "rollback" in (cfg.train.on_nan, cfg.train.on_spike):
            self._save("a checkpoint to roll back to")
        return decision

    def _evaluate_and_save(self) -> Decision:
        """What follows a step: evaluation and checkpoint where they are due, and whether all ranks leave."""
        self.state.has_open_evaluation = False
        if self._every(self.run.cfg.validation.eval_interval):
            self._evaluate()
        return self._decide()

    def _decide(self) -> Decision:
        """Decides with all ranks whether to save or leave, and saves."""
        iteration = self.state.iteration
        self.watchdog.beat(f"iteration {iteration}: agreeing with all ranks whether to save or leave")
        decision = self.boundary.decide(iteration, self.run.stop_reason)
        self.watchdog.restore_timeout()
        if decision.leave:
            self.saver.announce_end()
        if decision.save:
            self._save(decision.save)
        self.saver.finalize()
        return decision

    def _end_phase(self) -> None:
        """Saves the checkpoint with which the next phase begins."""
        reason = f"end of phase {self.run.resolved.phase.name}"
        self._tell(self.spikes.end())
        self._save_the_end(reason)
        self.saver.check_end(reason)

    def enter(
        self,
        run: Run,
        saver: Saver,
        watch: FaultWatch,
        throughput: Throughput,
        measurements: Measurements,
        tuner: LossFactorTuner | None,
    ) -> None:
        """Goes on in another phase with the next call of `train`."""
        self.run, self.saver, self.watch, self.throughput = run, saver, watch, throughput
        self.measurements, self.tuner = measurements, tuner
        self.boundary.follow(run.cfg)
        self.spikes = Repeats()

    def _end(self, decision: Decision) -> Decision:
        """What follows the last step. SIGTERM during the last evaluation is a preemption: a resume repeats it."""
        validation = self.run.cfg.validation
        is_due = validation.eval_at_end and not self._every(validation.eval_interval)
        if is_due and not decision.is_preempted and not self._evaluate():
            decision = self._decide()
        self._tell(self.spikes.end())
        self.saver.announce_end()
        self._save_the_end()
        self._call("on_train_end")
        return decision

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

    def _step(self, batch: GlobalBatch, data_s: float) -> Action:
        """One step, counted and recorded unless the run goes back because of it.

        Args:
            data_s: seconds that the batch was waited for.
        """
        cfg, state, engine = self.run.cfg, self.state, self.run.engine
        self.watchdog.beat(f"iteration {state.iteration + 1}: the step")
        started = time.perf_counter()
        resolved = self.run.resolved
        clock = resolved.clock.at(state.consumed_samples, state.consumed_tokens)
        rate = apply_schedules(engine.optimizer, resolved.learning_rate, resolved.weight_decay, clock)
        loss_factor = resolved.loss_factor.at(state.consumed_tokens) * (self.tuner.scale if self.tuner else 1.0)
        loss_scale = float(engine.optimizer.get_loss_scale())
        self.measurements.begin(state.iteration + 1)
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
        measured = self.measurements.read(loss_scale)
        if self.tuner and (changed := self.tuner.step(state.iteration, result.named_losses() | measured)):
            self.recorder.message(changed, kind="autotune", iteration=state.iteration)
        record = step_record(
            self.run,
            state,
            result,
            batch_size=len(batch.sample_ids),
            learning_rate=rate,
            loss_factor=loss_factor,
            elapsed_s=elapsed_s,
            rates=self.throughput.rates(len(batch.sample_ids), elapsed_s),
            extra=measured | self.saver.metrics() | {"perf/data_ms": data_s * 1e3},
        )
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
        if self.tuner:
            self.tuner.load_state_dict(self.state.health.get("autotune", {}))
        self.recorder.roll_back(self.state.iteration, self.state.health.get("signs"))

    def _evaluate(self) -> bool:
        """Evaluates and records all validation sets, if there are any. False: SIGTERM came, and nothing is recorded."""
        cfg, state = self.run.cfg, self.state
        if not cfg.validation.eval_iters or not self.run.data.valid_names:
            return True
        self.watchdog.beat(f"iteration {state.iteration}: evaluation")
        loss_factor = self.run.resolved.loss_factor.at(state.consumed_tokens)
        between = BetweenBatches(self.boundary.signals, lambda: self._save("SIGUSR1"), logger.info)
        state.has_open_evaluation = True  # in what a signal saves
        try:
            self.evaluations = evaluate(self.run.engine, self.run.data, loss_factor, between=between)
        except StoppedEvaluationError as error:
            self.recorder.message(f"iteration {state.iteration}: {error} A resume repeats it.")
            return False
        state.has_open_evaluation = False
        first = next(iter(self.evaluations.values()))
        first_loss = f"{set_label(next(iter(self.evaluations)))}/lm loss"
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
            self._save(f"lowest {cfg.checkpoint.best_metric or first_loss}")
        return True

    def _save(self, reason: str) -> None:
        if not self.saver.is_due:
            return
        self.watchdog.beat(f"iteration {self.state.iteration}: saving ({reason})")
        self._call("on_save")
        if signs := self.recorder.state().get("signs"):  # on the rank that writes
            self.state.health["signs"] = signs
        if self.tuner:
            self.state.health["autotune"] = self.tuner.state_dict()
        self.state.callbacks |= {callback.name: kept for callback in self.callbacks if (kept := callback.state_dict())}
        if self.saver.save(reason):
            self.boundary.saved()

    def _every(self, interval: int | None) -> bool:
        return interval is not None and self.state.iteration % interval == 0

    def _call(self, event: str, *arguments: Any, taken: Collection[str] = ()) -> dict[str, float]:
        """Calls an event of every callback; see `call_event`."""
        return call_event(self.callbacks, event, self.run, self.state, *arguments, taken=taken)
