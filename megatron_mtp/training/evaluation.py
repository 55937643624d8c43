"""Held-out loss and acceptance of every depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from megatron_mtp.config.blend import set_label
from megatron_mtp.data.loader import DataModule
from megatron_mtp.errors import StoppedEvaluationError
from megatron_mtp.objective.metrics import BatchMetrics
from megatron_mtp.observe.progress import Pace
from megatron_mtp.training.guards.data_errors import agreed_with
from megatron_mtp.training.guards.preemption import SignalWatch
from megatron_mtp.training.step import Engine

EvaluationResult = BatchMetrics
"""Metrics of all batches of one validation set together."""


@dataclass(frozen=True, slots=True)
class BetweenBatches:
    """What happens between the batches of an evaluation. Every rank does the same.

    Args:
        signals: if any rank has received SIGTERM, the evaluation stops; SIGUSR1 calls `on_save`.
        on_save: may use collectives.
        say: takes lines about the progress of sets that take longer than `first_s`.
        first_s, every_s: seconds until the first line, and between lines.
    """

    signals: SignalWatch
    on_save: Callable[[], None]
    say: Callable[[str], None]
    first_s: float = 10.0
    every_s: float = 60.0


def evaluate(
    engine: Engine,
    data: DataModule,
    loss_factor: float,
    names: Sequence[str] | None = None,
    between: BetweenBatches | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluates validation sets on their first batches, the same ones at each call.

    Args:
        loss_factor: lambda; it changes no metric, but the forward pass needs an objective.
        names: of the sets; None: all.
        between: None: it takes no notice of signals, and says nothing.

    Returns:
        Validation set name -> result, the main set first.

    Raises:
        LostDataError: on every rank: some rank can no longer read a set.
        StoppedEvaluationError: on every rank, before the same batch: some rank has received SIGTERM.
    """
    chosen = data.valid_names if names is None else names
    return {name: _evaluate_one(engine, data, loss_factor, name, between) for name in chosen}


def _evaluate_one(
    engine: Engine, data: DataModule, loss_factor: float, name: str, between: BetweenBatches | None
) -> EvaluationResult:
    total, label, found = data.num_valid_batches(name), set_label(name), None
    pace = Pace(f"evaluation of {label}", "batches", total)
    if between is not None:
        pace.first_s, pace.every_s = between.first_s, between.every_s
    noticed = (lambda: ()) if between is None else (lambda: between.signals.noticed)
    with closing(agreed_with(data.valid(name), engine.device, noticed)) as batches:
        for done, (batch, flags) in enumerate(batches):
            if between is not None:
                _attend(between, flags, f"{label}, {done:,} of {total:,} batches done")
                if line := pace.line(done):
                    between.say(line)
            result = engine.evaluate(batch, loss_factor)
            found = result if found is None else found + result
    assert found is not None, "a validation set has a batch"
    return found


def _attend(between: BetweenBatches, flags: Sequence[bool], place: str) -> None:
    """Does what the signals of any rank ask for."""
    leaves, saves = flags
    if leaves:
        raise StoppedEvaluationError(f"SIGTERM: the evaluation stops ({place}).")
    if saves:
        between.signals.wants_save = False
        between.on_save()
