"""What may happen beside training, at a closed set of moments.

The loop knows nothing of what callbacks do; tools and the command line hand them in. Every rank calls them, so a callback may
use collectives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mtp.training.evaluation import EvaluationResult
    from megatron_mtp.training.setup import Run
    from megatron_mtp.training.state import TrainState
    from megatron_mtp.training.step import StepResult


class Callback:
    """Override what you need. An exception ends the run."""

    def on_train_start(self, run: Run, state: TrainState) -> None:
        """The model is built and restored; no step has been done by this process."""

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """A step is done and counted in `state`; nothing of it is recorded or saved yet."""

    def on_evaluation(self, run: Run, state: TrainState, results: dict[str, EvaluationResult]) -> dict[str, float]:
        """All validation sets were evaluated. Returned figures are recorded with the first set's."""
        return {}

    def on_save(self, run: Run, state: TrainState) -> None:
        """A checkpoint is about to be written."""

    def on_train_end(self, run: Run, state: TrainState) -> None:
        """The loop has ended in order; groups and data are still there."""
