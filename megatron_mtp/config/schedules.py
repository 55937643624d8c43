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
from typing import Any

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


def run_length_samples(cfg: RunConfig) -> int | None:
    """Samples after which the run ends: the earliest end of its iterations, samples and tokens.

    None: the run ends by wall-clock time only.
    """
    ends = [
        _samples(cfg, iters=cfg.train.train_iters),
        _samples(cfg, samples=cfg.train.train_samples),
        _samples(cfg, tokens=cfg.train.train_tokens),
    ]
    return min((end for end in ends if end is not None), default=None)


def _samples(
    cfg: RunConfig, *, iters: int | None = None, samples: int | None = None, tokens: int | str | None = None
) -> int | None:
    """One length in samples: whichever of the three is given (0 counts as given only if all others are absent too)."""
    if iters:
        return BatchSchedule.of(cfg.train).consumed_after(iters)
    if samples:
        return samples
    if tokens and (count := parse_quantity(tokens)):
        return -(-count // cfg.model.seq_length)
    return None


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Learning rate after some samples; lengths in samples.

    Linear warmup from `init` to the peak, then the decay to `min_lr`, which holds from `decay` on. WSD holds the peak
    until its last `wsd_decay` samples. `constant` and a warmup that is longer than the decay never use the decay.
    """

    max_lr: float
    min_lr: float
    init: float
    warmup: float
    decay: int
    style: str
    wsd_decay: int = 0
    wsd_style: str = "minus_sqrt"

    def __call__(self, consumed_samples: int, max_lr: float | None = None, min_lr: float | None = None) -> float:
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

    def _share_left(self, consumed_samples: int) -> float:
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
    length: int
    style: str

    def __call__(self, consumed_samples: int, start: float | None = None, end: float | None = None) -> float:
        """The value of the step that starts after `consumed_samples`, with a parameter group's own ends, if any."""
        start = self.start if start is None else start
        end = self.end if end is None else end
        if self.style == "constant" or consumed_samples > self.length:
            return end
        share = consumed_samples / self.length
        if self.style == "cosine":
            share = 0.5 * (math.cos(math.pi * (1 - share)) + 1.0)
        return start + share * (end - start)


def learning_rate(cfg: RunConfig) -> LearningRate:
    """The learning-rate schedule of a finalized config."""
    scheduler, optimizer = cfg.scheduler, cfg.optimizer
    decay = _samples(
        cfg,
        iters=scheduler.lr_decay_iters,
        samples=scheduler.lr_decay_samples,
        tokens=scheduler.lr_decay_tokens,
    )
    decay = decay or run_length_samples(cfg)
    warmup: float | None
    if decay is not None and scheduler.lr_warmup_fraction is not None:
        warmup = scheduler.lr_warmup_fraction * decay
    else:
        warmup = _samples(
            cfg,
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
        wsd_decay=_wsd_decay(cfg, decay),
        wsd_style=scheduler.lr_wsd_decay_style,
    )


def _wsd_decay(cfg: RunConfig, decay: int | None) -> int:
    """Samples of WSD's last phase; 0 for other styles. In iterations it is counted back from the end of the decay."""
    scheduler = cfg.scheduler
    if scheduler.lr_decay_style != "WSD":
        return 0
    if scheduler.lr_wsd_decay_iters and decay is not None:
        # The last iterations of a ramped run hold more samples than the first ones.
        schedule = BatchSchedule.of(cfg.train)
        start = max(0, schedule.step_at(decay) - scheduler.lr_wsd_decay_iters)
        return decay - schedule.consumed_after(start)
    return filled(_samples(cfg, samples=scheduler.lr_wsd_decay_samples, tokens=scheduler.lr_wsd_decay_tokens))


def weight_decay(cfg: RunConfig) -> WeightDecay:
    """The weight-decay schedule of a finalized config; it moves over the complete run."""
    scheduler, default = cfg.scheduler, cfg.optimizer.weight_decay
    return WeightDecay(
        start=default if scheduler.start_weight_decay is None else scheduler.start_weight_decay,
        end=default if scheduler.end_weight_decay is None else scheduler.end_weight_decay,
        length=run_length_samples(cfg) or 0,
        style=scheduler.weight_decay_incr_style,
    )
