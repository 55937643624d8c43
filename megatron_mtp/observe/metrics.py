"""The metrics of one training step, with the name, unit and format that each has in every record."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """What one training step did. All values are global: over every rank and micro-batch of the step."""

    iteration: int
    """Steps done, this one included."""
    train_iters: int | None
    """Steps of the complete run; None where the run does not end by a number of steps."""
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
    """Nats per token in console order: `lm loss`, `load_balancing_loss` and `z_loss` if the model has them,
    `mtp_1 loss`, ..."""
    loss_scale: float = 1.0
    """fp16's loss scale."""
    grad_norm: float | None = None
    """Global L2 norm before clipping; None where it was not computed."""
    num_zeros: int | None = None
    """Zeros in the gradients; None where they were not counted."""
    skipped: int = 0
    """1 if the update was skipped (overflow), else 0."""
    nan: int = 0
    """1 if a loss or the gradient was not a number, else 0."""
    tokens_per_s_per_device: float | None = None
    """Training tokens per second and device; None if unknown."""
    tflops_per_device: float | None = None
    """Model TFLOP/s of each device; None if unknown."""
    mfu: float | None = None
    """tflops_per_device over the dense peak of device and dtype, 0 to 1; None if the peak is unknown."""
    extra: dict[str, float] = field(default_factory=dict)
    """Built-in metrics of each depth and the like, by full name: to every sink but not to the console line."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that callbacks returned, by full name: to every sink and to the console line."""


@dataclass(frozen=True, slots=True)
class Column:
    """One metric: its label and format on the console, its name in TensorBoard, W&B and JSONL."""

    label: str
    name: str
    form: str
    value: Callable[[StepRecord], float | None]

    def text(self, record: StepRecord) -> str | None:
        """`label: value`, or None if the record has no such value. NaN and Inf are printed as they are."""
        value = self.value(record)
        if value is None:
            return None
        # An integer format refuses floats: means over several steps, and NaN.
        form = self.form if isinstance(value, int) or not self.form.endswith("d") else self.form[:-1] + "g"
        return f"{self.label}: {value:{form}}"


# Labels and formats: megatron.training.training.training_log. Names with a slash (`area/thing_unit`) are ours.
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
    Column("number of skipped iterations", "skipped-iterations", "3d", lambda r: r.skipped),
    Column("number of nan iterations", "nan-iterations", "3d", lambda r: r.nan),
)
THROUGHPUT = (
    Column("tokens/s per device", "perf/tokens_per_s_per_device", ".1f", lambda r: r.tokens_per_s_per_device),
    Column("TFLOP/s per device", "perf/tflops_per_device", ".2f", lambda r: r.tflops_per_device),
    Column("MFU", "perf/mfu", ".4f", lambda r: r.mfu),
)


def columns(record: StepRecord, throughput: bool = True) -> list[Column]:
    """The columns of the console line for this record, in order.

    Args:
        record: decides which losses and which metrics of callbacks there are.
        throughput: whether to include tokens/s, TFLOP/s and MFU.
    """

    def column(group: str, name: str, form: str) -> Column:
        return Column(name, name, form, lambda record: getattr(record, group)[name])

    losses = [column("losses", name, ".6E") for name in record.losses]
    metrics = [column("metrics", name, ".6g") for name in record.metrics]
    return [*BEFORE_LOSSES, *losses, *AFTER_LOSSES, *(THROUGHPUT if throughput else ()), *metrics]


def scalars(record: StepRecord) -> dict[str, float]:
    """Every value of the console line, consumed tokens and the extra metrics, by the name that all sinks use."""
    named = {column.name: column.value(record) for column in columns(record)}
    named |= {"consumed-tokens": record.consumed_tokens, **record.extra}
    return {name: value for name, value in named.items() if value is not None}


def evaluation_tag(name: str, metric: str) -> str:
    """The name of a metric of a validation set in TensorBoard and W&B, which group by what stands before a slash.

    Example: "valid/docs/lm loss".
    """
    return f"valid/{name}/{metric}"


def token_losses[T](metrics: Mapping[str, T]) -> dict[str, T]:
    """Of all metrics, the losses in nats per predicted token: `lm loss` and `mtp_k loss`."""
    return {name: value for name, value in metrics.items() if _is_token_loss(name)}


@lru_cache(maxsize=1024)
def _is_token_loss(name: str) -> bool:
    return re.fullmatch(r"(lm|mtp_\d+) loss", name) is not None


class Interval:
    """Merges the steps between two lines of a record.

    Losses, times, extra metrics and metrics of callbacks are means over the steps that have them; a mean with a NaN is
    NaN, so none is lost. Rates are weighted by time, skipped and NaN iterations are counted, and the rest is the last
    step's.
    """

    def __init__(self) -> None:
        self._records: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Adds one step."""
        self._records.append(record)

    def merged(self) -> StepRecord:
        """The steps so far as one record. Needs at least one step."""
        records, last = self._records, self._records[-1]
        return replace(
            last,
            elapsed_ms=_mean([r.elapsed_ms for r in records]),
            losses=_means([r.losses for r in records], last.losses),
            extra=_means([r.extra for r in records]),
            metrics=_means([r.metrics for r in records]),
            skipped=sum(r.skipped for r in records),
            nan=sum(r.nan for r in records),
            tokens_per_s_per_device=self._rate(lambda r: r.tokens_per_s_per_device),
            tflops_per_device=self._rate(lambda r: r.tflops_per_device),
            mfu=self._rate(lambda r: r.mfu),
        )

    def drain(self) -> StepRecord:
        """Returns `merged()` and begins a new interval."""
        merged = self.merged()
        self._records.clear()
        return merged

    def _rate(self, value: Callable[[StepRecord], float | None]) -> float | None:
        """Mean of a rate, weighted by the time of each step: amount over time."""
        known = [(rate, r.elapsed_ms) for r in self._records if (rate := value(r)) is not None]
        time_ms = math.fsum(elapsed for _, elapsed in known)
        return math.fsum(rate * elapsed for rate, elapsed in known) / time_ms if time_ms else None


def _means(steps: list[dict[str, float]], names: Iterable[str] | None = None) -> dict[str, float]:
    """Mean of each name over the steps that have it. None: all names, in order of appearance."""
    names = dict.fromkeys(name for step in steps for name in step) if names is None else names
    return {name: _mean([step[name] for step in steps if name in step]) for name in names}


def _mean(values: list[float]) -> float:
    # Not fsum: it raises on inf - inf, and a diverged run must still be recorded.
    return sum(values) / len(values)
