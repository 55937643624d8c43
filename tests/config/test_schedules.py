"""Schedules equal Megatron-Core's OptimizerParamScheduler point by point, in every style and unit."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.config import ConfigContainer, schedules
from megatron_mtp.config.schedules import BatchSchedule, LearningRate, WeightDecay
from megatron_mtp.config.timeline import ScheduleClock, Timeline
from megatron_mtp.training.optimizer import apply_schedules

pytestmark = pytest.mark.unit

STYLES = [
    *itertools.product(["constant", "linear", "cosine", "inverse-square-root"], [None]),
    *itertools.product(["WSD"], ["exponential", "linear", "cosine", "minus_sqrt"]),
]


def make_config(**scheduler) -> ConfigContainer:
    cfg = ConfigContainer()
    cfg.train.train_iters = 40
    cfg.train.global_batch_size = 4
    cfg.model.seq_length = 128
    cfg.optimizer.lr = 1e-3
    cfg.optimizer.min_lr = 1e-5
    for name, value in scheduler.items():
        setattr(cfg.scheduler, name, value)
    return cfg


def megatron_values(
    cfg: ConfigContainer, groups: list[dict], sizes: list[int], **lengths
) -> list[list[tuple[float, float]]]:
    """(lr, weight decay) of each group before each step, from the class of Megatron-Core itself."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=groups),
        init_lr=cfg.scheduler.lr_warmup_init,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr,
        lr_decay_style=cfg.scheduler.lr_decay_style,
        start_wd=cfg.scheduler.start_weight_decay or cfg.optimizer.weight_decay,
        end_wd=cfg.scheduler.end_weight_decay or cfg.optimizer.weight_decay,
        wd_incr_style=cfg.scheduler.weight_decay_incr_style,
        lr_wsd_decay_style=cfg.scheduler.lr_wsd_decay_style,
        **lengths,
    )
    values = []
    for size in sizes:
        values.append([(g["lr"], g["weight_decay"]) for g in groups])
        scheduler.step(size)
    return values


def learning_rate(cfg: ConfigContainer) -> LearningRate:
    return schedules.learning_rate(cfg, ScheduleClock(Timeline.of(cfg), 0))


def weight_decay(cfg: ConfigContainer) -> WeightDecay:
    return schedules.weight_decay(cfg, ScheduleClock(Timeline.of(cfg), 0))


def our_values(cfg: ConfigContainer, groups: list[dict], sizes: list[int]) -> list[list[tuple[float, float]]]:
    lr, wd = learning_rate(cfg), weight_decay(cfg)
    values, consumed = [], 0
    for size in sizes:
        apply_schedules(SimpleNamespace(param_groups=groups), lr, wd, consumed)
        values.append([(g["lr"], g["weight_decay"]) for g in groups])
        consumed += size
    return values


def make_groups() -> list[dict]:
    return [{}, {"max_lr": 5e-3, "min_lr": 1e-4}, {"wd_mult": 0.0}, {"start_wd": 0.02, "end_wd": 0.02}]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("style", "wsd_style"), STYLES)
def test_equals_megatron_in_iterations(style, wsd_style, warmup):
    cfg = make_config(lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=30, lr_warmup_init=1e-6)
    if style == "WSD":
        cfg.scheduler.lr_wsd_decay_style, cfg.scheduler.lr_wsd_decay_iters = wsd_style, 11
    sizes = [4] * 45  # past the end of the decay and of the run
    theirs = megatron_values(
        cfg, make_groups(), sizes, lr_warmup_steps=warmup * 4, lr_decay_steps=120, wd_incr_steps=160, wsd_decay_steps=44
    )
    assert our_values(cfg, make_groups(), sizes) == theirs
    assert len({step[0] for step in theirs}) > 1 or (style == "constant" and not warmup), "the reference never moved"


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_weight_decay_equals_megatron(style):
    cfg = make_config(lr_decay_style="constant", weight_decay_incr_style=style, end_weight_decay=0.3)
    cfg.scheduler.start_weight_decay = 0.3 if style == "constant" else 0.1
    sizes = [4] * 50
    theirs = megatron_values(cfg, [{}], sizes, lr_warmup_steps=0, lr_decay_steps=160, wd_incr_steps=160)
    assert our_values(cfg, [{}], sizes) == theirs


def test_equals_megatron_with_warmup_as_a_share_of_the_decay():
    cfg = make_config(lr_decay_style="linear", lr_warmup_fraction=0.13)
    theirs = megatron_values(cfg, [{}], [4] * 45, lr_warmup_steps=0.13 * 160, lr_decay_steps=160, wd_incr_steps=160)
    assert our_values(cfg, [{}], [4] * 45) == theirs


def test_samples_and_tokens_give_the_curve_of_iterations():
    lengths = {"lr_warmup": 5, "lr_decay": 30, "lr_wsd_decay": 10}
    curves = []
    for unit, factor in (("iters", 1), ("samples", 4), ("tokens", 4 * 128)):
        cfg = make_config(lr_decay_style="WSD", **{f"{name}_{unit}": n * factor for name, n in lengths.items()})
        curves.append(our_values(cfg, [{}], [4] * 40))
    assert curves[0] == curves[1] == curves[2]


def test_tokens_may_be_written_in_words():
    cfg = make_config(lr_decay_style="linear", lr_decay_tokens="10K")
    assert learning_rate(cfg).decay == -(-10_000 // 128)


def test_iterations_go_through_the_batch_ramp():
    cfg = make_config(lr_decay_style="WSD", lr_warmup_iters=3, lr_wsd_decay_iters=4)
    cfg.train.rampup_batch_size = [1, 1, 12]
    schedule = BatchSchedule.of(cfg.train)
    sizes = [size for size, _ in zip(iter_sizes(schedule), range(40), strict=False)]
    assert len(set(sizes)) == 4, "the ramp was not walked"
    lr = learning_rate(cfg)
    assert lr.warmup == sum(sizes[:3])
    assert lr.decay == sum(sizes)
    assert lr.wsd_decay == sum(sizes[-4:])
    theirs = megatron_values(
        cfg,
        [{}],
        sizes,
        lr_warmup_steps=sum(sizes[:3]),
        lr_decay_steps=sum(sizes),
        wd_incr_steps=sum(sizes),
        wsd_decay_steps=16,
    )
    assert our_values(cfg, [{}], sizes) == theirs


def iter_sizes(schedule: BatchSchedule):
    consumed = 0
    while True:
        size = schedule.size_at(consumed)
        yield size
        consumed += size


@pytest.mark.parametrize(
    ("train", "samples"),
    [
        ({"train_iters": 10}, 40),
        ({"train_iters": None, "train_samples": 33}, 33),
        ({"train_iters": None, "train_tokens": 1281}, 11),
        ({"train_iters": 10, "train_samples": 33}, 33),
        ({"train_iters": None}, None),
    ],
)
def test_run_length(train, samples):
    cfg = make_config()
    for name, value in train.items():
        setattr(cfg.train, name, value)
    assert Timeline.of(cfg).end_samples() == samples


def test_a_warmup_longer_than_the_run_warms_up_to_the_end():
    """A recipe's warmup of 500 steps must not stop a try of 10 steps; Megatron's class asserts here."""
    cfg = make_config(lr_decay_style="cosine", lr_warmup_iters=80)
    values = [step[0][0] for step in our_values(cfg, [{}], [4] * 40)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1e-3 * 39 / 80)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(STYLES),
    st.integers(0, 50),
    st.integers(1, 200),
    st.integers(1, 100),
    st.integers(0, 300),
)
def test_the_rate_stays_between_its_bounds(style, warmup, decay, wsd, consumed):
    lr = LearningRate(
        max_lr=1.0,
        min_lr=0.1,
        init=0.1,
        warmup=warmup,
        decay=decay,
        style=style[0],
        wsd_decay=wsd,
        wsd_style=style[1] or "linear",
    )
    assert 0.1 - 1e-12 <= lr(consumed) <= 1.0 + 1e-12


def test_apply_fills_tensor_rates_and_returns_the_default_rate():
    import torch

    cfg = make_config(lr_decay_style="constant")
    tensor = torch.zeros(())
    groups = [{"lr": tensor, "lr_mult": 0.5}]
    logged = apply_schedules(SimpleNamespace(param_groups=groups), learning_rate(cfg), weight_decay(cfg), 0)
    assert groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(5e-4)
    assert logged == 1e-3
