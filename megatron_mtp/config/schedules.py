"""Learning rate and weight decay as pure functions of the samples consumed so far.

Values equal megatron.core's OptimizerParamScheduler point by point, but nothing is stepped and nothing must be saved:
after a resume, at another batch size or in a plot, the value follows from the clock alone. The clock is samples;
lengths given in iterations go through the batch-size schedule, lengths in tokens are divided by the sequence length.
A step whose update was skipped (fp16 overflow) consumed its samples, so it moves the clock too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_mtp.config.filled import filled
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.config.sections import RunConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Global batch size as a function of the samples consumed so far.

    With `rampup` = (start, increment, samples) the batch grows from start to `global_batch_size` in equal increments
    over that many samples, each held for samples / number of increments: Megatron's --rampup-batch-size. Its rules are
    in `checks.run.ramp_problems`.
    """

    global_batch_size: int
    rampup: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> BatchSchedule:
        """The schedule of a TrainConfig whose ramp, if any, was checked."""
        ramp: Any = train.rampup_batch_size  # three numbers
        return cls(train.global_batch_size, tuple(ramp) if ramp else None)

    def size_at(self, consumed_samples: int) -> int:
        """Samples in the global batch that starts after `consumed_samples`."""
        if self.rampup is None:
            return self.global_batch_size
        start, increment, samples = self.rampup
        increments = (self.global_batch_size - start) // increment
        if increments == 0 or consumed_samples > samples or samples == 0:
            return self.global_batch_size
        return start + increment * (consumed_samples * increments // samples)

    def sizes(self) -> list[int]:
        """Every batch size that occurs, in order; each must divide by micro-batch times data-parallel size."""
        if self.rampup is None:
            return [self.global_batch_size]
        start, increment, _ = self.rampup
        return list(range(start, self.global_batch_size + 1, increment))

    def step_at(self, consumed_samples: int) -> int:
        """Number of complete steps before `consumed_samples`; walks the ramp, then divides."""
        step = position = 0
        ramp_end = self.rampup[2] if self.rampup else -1
        while position <= ramp_end and position < consumed_samples:
            position += self.size_at(position)
            step += 1
        return step + max(0, -(-(consumed_samples - position) // self.global_batch_size))

    def consumed_after(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps."""
        position = step = 0
        ramp_end = self.rampup[2] if self.rampup else -1
        while position <= ramp_end and step < steps:
            position += self.size_at(position)
            step += 1
        return position + (steps - step) * self.global_batch_size


class Lengths(Protocol):
    """Turns lengths since the start of a schedule into its clock, which is samples of the length at its start."""

    def of_iterations(self, iterations: int) -> float:
        """The clock after some steps."""

    def of_samples(self, samples: int) -> float:
        """The clock after some samples, of whatever length."""

    def of_tokens(self, tokens: int) -> float:
        """The clock after some tokens, rounded up."""

    def iterations_at(self, clock: float) -> int:
        """Steps until the clock is reached."""

    def end_of_run(self) -> float | None:
        """The clock at the end of the run; None: it ends by wall-clock time only."""


def _clock(
    lengths: Lengths, *, iters: int | None = None, samples: int | None = None, tokens: int | str | None = None
) -> float | None:
    """One length on the clock: whichever of the three is given; 0 is not given."""
    if iters:
        return lengths.of_iterations(iters)
    if samples:
        return lengths.of_samples(samples)
    if tokens and (count := parse_quantity(tokens)):
        return lengths.of_tokens(count)
    return None


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Learning rate after some samples; lengths in samples, which are tokens over a fixed length in runs with phases.

    Linear warmup from `init` to the peak, then the decay to `min_lr`, which holds from `decay` on. WSD holds the peak
    until its last `wsd_decay` samples. `constant` and a warmup that is longer than the decay never use the decay.
    """

    max_lr: float
    min_lr: float
    init: float
    warmup: float
    decay: float
    style: str
    wsd_decay: float = 0
    wsd_style: str = "minus_sqrt"

    def __call__(self, consumed_samples: float, max_lr: float | None = None, min_lr: float | None = None) -> float:
        """The rate of the step that starts after `consumed_samples`; a parameter group may have its own bounds."""
        max_lr = self.max_lr if max_lr is None else max_lr
        min_lr = self.min_lr if min_lr is None else min_lr
        if self.warmup > 0 and consumed_samples <= self.warmup:
            return self.init + (max_lr - self.init) * consumed_samples / self.warmup
        if self.style == "constant":
            return max_lr
        if consumed_samples > self.decay:
            return min_lr
        if self.style == "inverse-square-root":
            return max(min_lr, max_lr * float(max(self.warmup, 1) ** 0.5) / float(max(consumed_samples, 1) ** 0.5))
        return min_lr + self._share_left(consumed_samples) * (max_lr - min_lr)

    def _share_left(self, consumed_samples: float) -> float:
        """1 at the start of the decay, 0 at its end."""
        if self.style == "WSD":
            start = self.decay - self.wsd_decay
            if consumed_samples <= start:
                return 1.0
            return _SHAPES[self.wsd_style]((consumed_samples - start) / self.wsd_decay)
        return _SHAPES[self.style]((consumed_samples - self.warmup) / (self.decay - self.warmup))


# Share of the way from floor to peak that is left after a share x of the decay.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * math.pow(0.5, x) - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


@dataclass(frozen=True, slots=True)
class WeightDecay:
    """Weight decay after some samples: moves from `start` to `end` over `length` samples, then stays."""

    start: float
    end: float
    length: float
    style: str

    def __call__(self, consumed_samples: float, start: float | None = None, end: float | None = None) -> float:
        """The value of the step that starts after `consumed_samples`, with a parameter group's own ends, if any."""
        start = self.start if start is None else start
        end = self.end if end is None else end
        if self.style == "constant" or consumed_samples > self.length:
            return end
        share = consumed_samples / self.length
        if self.style == "cosine":
            share = 0.5 * (math.cos(math.pi * (1 - share)) + 1.0)
        return start + share * (end - start)


def learning_rate(cfg: RunConfig, lengths: Lengths) -> LearningRate:
    """The learning-rate schedule of a finalized config.

    Args:
        lengths: since the start of the schedule.
    """
    scheduler, optimizer = cfg.scheduler, cfg.optimizer
    decay = _clock(
        lengths,
        iters=scheduler.lr_decay_iters,
        samples=scheduler.lr_decay_samples,
        tokens=scheduler.lr_decay_tokens,
    )
    decay = decay or lengths.end_of_run()
    warmup: float | None
    if decay is not None and scheduler.lr_warmup_fraction is not None:
        warmup = scheduler.lr_warmup_fraction * decay
    else:
        warmup = _clock(
            lengths,
            iters=scheduler.lr_warmup_iters,
            samples=scheduler.lr_warmup_samples,
            tokens=scheduler.lr_warmup_tokens,
        )
    return LearningRate(
        max_lr=float(optimizer.lr),
        min_lr=optimizer.min_lr,
        init=scheduler.lr_warmup_init,
        warmup=warmup or 0,
        decay=decay or 0,
        style=scheduler.lr_decay_style,
        wsd_decay=_wsd_decay(cfg, lengths, decay),
        wsd_style=scheduler.lr_wsd_decay_style,
    )


def _wsd_decay(cfg: RunConfig, lengths: Lengths, decay: float | None) -> float:
    """Samples of WSD's last phase; 0 for other styles. In iterations it is counted back from the end of the decay."""
    scheduler = cfg.scheduler
    if scheduler.lr_decay_style != "WSD":
        return 0
    if scheduler.lr_wsd_decay_iters and decay is not None:
        # The last iterations of a ramped run hold more samples than the first ones.
        start = max(0, lengths.iterations_at(decay) - scheduler.lr_wsd_decay_iters)
        return decay - lengths.of_iterations(start)
    return filled(_clock(lengths, samples=scheduler.lr_wsd_decay_samples, tokens=scheduler.lr_wsd_decay_tokens))


def weight_decay(cfg: RunConfig, lengths: Lengths) -> WeightDecay:
    """The weight-decay schedule of a finalized config; it moves over the complete run. Arguments as `learning_rate`."""
    scheduler, default = cfg.scheduler, cfg.optimizer.weight_decay
    return WeightDecay(
        start=default if scheduler.start_weight_decay is None else scheduler.start_weight_decay,
        end=default if scheduler.end_weight_decay is None else scheduler.end_weight_decay,
        length=lengths.end_of_run() or 0,
        style=scheduler.weight_decay_incr_style,
    )
