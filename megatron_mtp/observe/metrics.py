"""The figures of one training step, with the name, unit and form that each has in every record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """What one training step did. All figures are global: over every rank and micro-batch of the step."""

    iteration: int
    """Steps done, this one included."""
    train_iters: int | None
    """Steps of the whole run; None where the run ends by something else."""
    consumed_samples: int
    """Training samples read since the start of the run."""
    consumed_tokens: int
    """consumed_samples times the sequence length."""
    elapsed_ms: float
    """Wall-clock time of the step in ms."""
    learning_rate: float
    """Learning rate of this step's update."""
    global_batch_size: int
    """Samples in the step."""
    losses: dict[str, float]
    """Nats per token in console order: `lm loss`, then `load_balancing_loss` and `z_loss` where the model has them, then `mtp_1 loss` ..."""
    loss_scale: float = 1.0
    """fp16's loss scale."""
    grad_norm: float | None = None
    """Global L2 norm before clipping; None where it was not computed."""
    num_zeros: int | None = None
    """Zeros in the gradients; None where they were not counted."""
    params_norm: float | None = None
    """Global L2 norm of the weights; None where it was not computed."""
    skipped: int = 0
    """1 if the update was skipped (overflow), else 0."""
    nan: int = 0
    """1 if a loss or the gradient was not a number, else 0."""
    tokens_per_s_per_device: float | None = None
    """Training tokens per second and device; None where it is not known."""
    tflops_per_device: float | None = None
    """Model TFLOP/s of each device; None where it is not known."""
    mfu: float | None = None
    """tflops_per_device over the dense peak of device and dtype, 0 to 1; None where the peak is not known."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further figures by their full name; they go to every sink but not to the console line."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure: its label and format on the console, its name in TensorBoard, W&B and JSONL."""

    label: str
    name: str
    form: str
    value: Callable[[StepRecord], float | None]

    def text(self, record: StepRecord) -> str | None:
        """`label: value`, or None where the record has no such value. NaN and Inf are printed as they are."""
        value = self.value(record)
        if value is None:
            return None
        # An integer format refuses a mean that is not whole, and NaN.
        form = self.form if isinstance(value, int) or not self.form.endswith("d") else self.form[:-1] + "g"
        return f"{self.label}: {value:{form}}"


# The labels and formats are those of megatron.training.training.training_log; names with a slash are ours, `area/thing_unit`.
BEFORE_LOSSES = (
    Column("consumed samples", "consumed-samples", "12d", lambda r: r.consumed_samples),
    Column("elapsed time per iteration (ms)", "perf/iteration_time_ms", ".1f", lambda r: r.elapsed_ms),
    Column("learning rate", "learning-rate", ".6E", lambda r: r.learning_rate),
    Column("global batch size", "batch-size", "5d", lambda r: r.global_batch_size),
)
AFTER_LOSSES = (
    Column("loss scale", "loss-scale", ".1f", lambda r: r.loss_scale),
    Column("grad norm", "grad-norm", ".3f", lambda r: r.grad_norm),
    Column("num zeros", "num-zeros", "d", lambda r: r.num_zeros),
    Column("params norm", "params-norm", ".3f", lambda r: r.params_norm),
    Column("number of skipped iterations", "skipped-iterations", "3d", lambda r: r.skipped),
    Column("number of nan iterations", "nan-iterations", "3d", lambda r: r.nan),
)
THROUGHPUT = (
    Column("tokens/s per device", "perf/tokens_per_s_per_device", ".1f", lambda r: r.tokens_per_s_per_device),
    Column("TFLOP/s per device", "perf/tflops_per_device", ".2f", lambda r: r.tflops_per_device),
    Column("MFU", "perf/mfu", ".4f", lambda r: r.mfu),
)


def columns(record: StepRecord, throughput: bool = True) -> list[Column]:
    """The columns of the console line for this record, in their order, its losses included.

    Args:
        record: decides which losses there are.
        throughput: with tokens/s, TFLOP/s and MFU.
    """
    losses = [Column(name, name, ".6E", lambda r, name=name: r.losses[name]) for name in record.losses]
    return [*BEFORE_LOSSES, *losses, *AFTER_LOSSES, *(THROUGHPUT if throughput else ())]


def scalars(record: StepRecord) -> dict[str, float]:
    """Every figure of the console line that has a value, then consumed tokens and the extra ones, by the name that all sinks use."""
    named = {column.name: column.value(record) for column in columns(record)}
    named |= {"consumed-tokens": record.consumed_tokens, **record.extra}
    return {name: value for name, value in named.items() if value is not None}


class Interval:
    """Merges the steps between two lines of a record.

    Losses and times are means over the steps, a NaN included (a mean with a NaN is NaN, so none is lost); rates are weighted by
    time; skipped and NaN iterations are counts; the rest is the last step's.
    """

    def __init__(self) -> None:
        self._records: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Takes in one more step."""
        self._records.append(record)

    def merged(self) -> StepRecord:
        """The steps so far as one record. Needs at least one step."""
        records, last = self._records, self._records[-1]
        return replace(
            last,
            elapsed_ms=_mean([r.elapsed_ms for r in records]),
            losses={name: _mean([r.losses[name] for r in records if name in r.losses]) for name in last.losses},
            skipped=sum(r.skipped for r in records),
            nan=sum(r.nan for r in records),
            tokens_per_s_per_device=self._rate(lambda r: r.tokens_per_s_per_device),
            tflops_per_device=self._rate(lambda r: r.tflops_per_device),
            mfu=self._rate(lambda r: r.mfu),
        )

    def drain(self) -> StepRecord:
        """`merged()`, and a new interval begins."""
        merged = self.merged()
        self._records.clear()
        return merged

    def _rate(self, value: Callable[[StepRecord], float | None]) -> float | None:
        """Mean of a rate, weighted by the time of each step: amount over time."""
        known = [(rate, r.elapsed_ms) for r in self._records if (rate := value(r)) is not None]
        time_ms = math.fsum(elapsed for _, elapsed in known)
        return math.fsum(rate * elapsed for rate, elapsed in known) / time_ms if time_ms else None


def _mean(values: list[float]) -> float:
    # Not fsum: it raises on inf - inf, and a diverged run must still be recorded.
    return sum(values) / len(values)
