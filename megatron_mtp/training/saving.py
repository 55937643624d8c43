"""Saves checkpoints and goes back to them. Training continues after a failed save."""

from __future__ import annotations

import logging
import math

from megatron_mtp.checkpoint import Checkpointer
from megatron_mtp.checkpoint.manifest import Evaluation
from megatron_mtp.errors import CheckpointError, NotSavedError
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState

logger = logging.getLogger(__name__)

KEPT = ("rollbacks", "nan_iterations", "skipped_iterations", "elapsed_s", "floating_point_operations", "wandb_run_id")
"""Fields of the train state that a rollback does not reset."""


class Saver:
    """Starts saves, completes them, and rolls back. Every method is a collective.

    Args:
        state: saved with each checkpoint; a rollback changes it in place.
        checkpointer: reads and writes the files.
    """

    def __init__(self, run: Run, state: TrainState, checkpointer: Checkpointer):
        self._run, self._state, self._checkpointer = run, state, checkpointer
        self._evaluated_at, self._evaluation = -1, Evaluation()
        self._metrics: dict[str, float] = {}
        self._tried: int | None = None

    def evaluated(self, main_loss: float, losses: dict[str, float]) -> bool:
        """Records an evaluation. Returns whether the loss that checkpoint.best_metric names is the lowest so far.

        A checkpoint of this iteration that was saved before gets the losses too.

        Args:
            main_loss: of the first validation set.
            losses: all of them, by "SET/LOSS".
        """
        state, metric = self._state, self._run.cfg.checkpoint.best_metric
        self._evaluated_at, self._evaluation = state.iteration, Evaluation(main_loss, losses)
        if self._checkpointer.last_saved == state.iteration:
            try:
                self._checkpointer.note_evaluation(self._evaluation)
            except CheckpointError as error:
                logger.error("%s", error)
        loss, best = self._evaluation.loss_by(metric), state.best_validation_loss
        if best is None or state.best_metric != metric:  # the lowest of another metric says nothing
            best = math.inf
        if loss is None or not math.isfinite(loss) or loss >= best:
            return False
        state.best_validation_loss, state.best_metric = loss, metric
        return True

    @property
    def is_due(self) -> bool:
        """Whether this iteration can be saved and has not been saved yet."""
        has_place = self._run.cfg.checkpoint.save is not None
        return has_place and self._checkpointer.last_saved != self._state.iteration

    @property
    def has_tried(self) -> bool:
        """Whether this process has tried to save this iteration."""
        return self._tried == self._state.iteration

    def save(self, reason: str) -> bool:
        """Saves, and returns whether it worked or is under way. A failure is logged: a later save may succeed."""
        state, engine = self._state, self._run.engine
        self._tried = state.iteration
        evaluation = self._evaluation if self._evaluated_at == state.iteration else Evaluation()
        try:
            self._checkpointer.save(engine.chunks, engine.optimizer, state, reason, evaluation)
        except CheckpointError as error:
            logger.error("%s", error)
            return False
        self._metrics["checkpoint/stall_ms"] = self._checkpointer.last_stall_s * 1e3
        return True

    def metrics(self) -> dict[str, float]:
        """Times in ms of saves since the last call: while training stood still, and until a checkpoint was complete."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def finalize(self, *, blocking: bool = False) -> None:
        """Completes an asynchronous save if its files are written, or waits for them."""
        try:
            if self._checkpointer.maybe_finalize(blocking) is not None:
                self._metrics["checkpoint/save_ms"] = self._checkpointer.last_save_s * 1e3
        except CheckpointError as error:
            logger.error("%s", error)

    def announce_end(self) -> None:
        """Tells a start that waits for the directory that this run is about to end."""
        self._checkpointer.announce_end()

    def check_end(self, reason: str | None) -> None:
        """Called at the end of the run.

        Args:
            reason: why it ends before its configured length; None: it does not.

        Raises:
            NotSavedError: on every rank: the present iteration is not saved.
        """
        if not self.is_due:
            return
        last, iteration = self._checkpointer.last_complete, self._state.iteration
        newest = "there is no checkpoint of this run" if last is None else f"the newest checkpoint is iteration {last}"
        raise NotSavedError(
            f"checkpoint.save = {self._run.cfg.checkpoint.save}: the run ends after iteration {iteration}"
            f"{f' ({reason})' if reason else ''}, and that was not saved; the errors above say why. Iterations "
            f"{(last or 0) + 1} to {iteration} are lost: {newest}. Free disk space or repair the directory, and start "
            "the run again."
        )

    def roll_back(self, samples: int) -> None:
        """Goes back to the newest complete checkpoint of this run, and skips the data up to this step, included.

        Args:
            samples: samples of the current step, which the state does not count yet.

        Raises:
            CheckpointError: on every rank: no checkpoint is complete.
        """
        state, engine = self._state, self._run.engine
        end = state.data_position + samples
        kept = {name: getattr(state, name) for name in KEPT}
        phases = state.phases
        self.finalize(blocking=True)
        self._checkpointer.roll_back(engine.chunks, engine.optimizer, state)
        if phases and state.iteration < phases[-1]["iteration"]:
            raise CheckpointError(
                f"the checkpoint with which phase {phases[-1]['name']} began is damaged, and iteration "
                f"{state.iteration} is of the phase before. Start the run again: it goes on there."
            )
        state.phases = phases  # the phase may have begun at this checkpoint, which was saved before it did
        for name, value in kept.items():
            setattr(state, name, value)
        state.rollbacks, state.skips_in_row = kept["rollbacks"] + 1, 0
        state.passed_over_samples = end - state.consumed_samples
