"""Python's garbage collector, at the same steps on every rank."""

from __future__ import annotations

import gc

from megatron_mtp.config import ConfigContainer
from megatron_mtp.training.callbacks.base import ConfiguredCallback
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult


class GarbageCollection(ConfiguredCallback):
    """Collects every `interval` steps and never in between: a rank that pauses alone makes all others wait."""

    def __init__(self, interval: int):
        self.interval = interval

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> GarbageCollection | None:
        """Asked for by train.manual_gc."""
        return cls(cfg.train.manual_gc_interval) if cfg.train.manual_gc else None

    def on_train_start(self, run: Run, state: TrainState) -> None:
        """Collects what the setup left and turns the automatic collection off. What stays is not looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step_end(self, run: Run, state: TrainState, result: StepResult) -> None:
        """Collects where the interval divides the iteration."""
        if state.iteration % self.interval == 0:
            gc.collect()

    def close(self) -> None:
        """Turns the automatic collection on again."""
        gc.unfreeze()
        gc.enable()
