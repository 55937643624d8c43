"""Callbacks of my_project; docs/extending.md has more of them. `--callback callbacks.py:Progress` uses this one."""

from megatron_mtp.training.callbacks import Callback, Metrics
from megatron_mtp.training.evaluation import EvaluationResult
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult


class Progress(Callback):
    """Records how far the first MTP depth is behind the main prediction, and stops at a target loss."""

    def __init__(self, target: float = 2.0):
        self.target = target

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> Metrics:
        """The gap in nats per token: on the console, in TensorBoard, W&B and metrics.jsonl."""
        main, first = result.losses[:2]
        return {"mtp_1/gap": first - main}

    def on_evaluation(self, run: Run, state: TrainState, results: dict[str, EvaluationResult]) -> None:
        """Ends the run with a checkpoint and exit code 0 when the main validation loss is low enough."""
        loss = next(iter(results.values())).losses[0]
        if loss < self.target:
            run.request_stop(f"the validation loss {loss:.3f} is below {self.target}")
