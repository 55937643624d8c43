"""Each sign appears on an unhealthy curve and never on healthy ones, noise included."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from megatron_mtp.observe.health import HealthMonitor, empty_agreement, signs_after_warmup

pytestmark = pytest.mark.unit

Curve = Callable[[int], tuple[float, ...]]
"""Step -> main loss, loss of depth 1, of depth 2 ..."""


def noisy(curve: Curve, steps: int, shared: float, own: float, seed: int) -> Iterator[tuple[int, dict[str, float]]]:
    """A curve with batch difficulty that all depths share, and noise of each depth, as standard deviations in nats."""
    source = random.Random(seed)
    for step in range(1, steps + 1):
        difficulty = source.gauss(0, shared)
        main, *mtp = (value + difficulty + source.gauss(0, own) for value in curve(step))
        yield step, {"lm loss": main} | {f"mtp_{k} loss": value for k, value in enumerate(mtp, 1)}


def watch(curve: Curve, steps: int, shared: float = 0.1, own: float = 0.05, seed: int = 0) -> list[str]:
    monitor = HealthMonitor()
    return [text for step, losses in noisy(curve, steps, shared, own, seed) for text in monitor.check(step, losses)]


def falling(step: int) -> float:
    """A power law from 10.4 to about 2, as a language model's loss falls."""
    return 1.7 + 8.7 * (1 + step / 20) ** -0.6


HEALTHY: dict[str, Curve] = {
    "usual": lambda t: (falling(t), falling(t) + 0.4 * (1 - math.exp(-t / 100))),
    "deep and hard to predict": lambda t: (
        falling(t),
        2 + 0.8 * falling(t),
        4.5 + 0.55 * falling(t),
        5.6 + 0.44 * falling(t),
    ),
    "flat": lambda t: (3.0, 3.6),
    "harder data from step 600": lambda t: tuple(falling(t) + gap + 0.5 * (t > 600) for gap in (0.0, 0.4)),
    "spike that heals": lambda t: tuple(falling(t) + gap + 4 * math.exp(-abs(t - 500) / 15) for gap in (0.0, 0.4)),
    "main loss turns up with the rest": lambda t: (3 + t / 2000, 3.5 + t / 2000),
    "MTP learns faster": lambda t: (falling(t), falling(2 * t)),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.0), (0.1, 0.02), (0.3, 0.15)])
def test_healthy_curves_are_silent(name: str, shared: float, own: float):
    for seed in range(3):
        assert watch(HEALTHY[name], 3000, shared, own, seed) == []


def test_a_long_noisy_run_is_silent():
    assert watch(HEALTHY["usual"], 100_000, shared=0.2, own=0.1) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm loss", "mtp_2 loss"])
def test_not_a_number_is_reported_once_and_at_once(name: str, bad: float):
    monitor = HealthMonitor()
    losses = {"lm loss": 3.0, "mtp_1 loss": 3.5, "mtp_2 loss": 3.9}
    assert monitor.check(1, losses) == []
    (message,) = monitor.check(2, losses | {name: bad})
    assert message.startswith(f"iteration 2: {name} is {bad}")
    for advice in ("optimizer.lr", "optimizer.clip_grad", "bf16", "mtp_loss_scaling_factor"):
        assert advice in message
    assert monitor.check(3, losses | {name: bad}) == []


def test_router_losses_are_not_watched():
    assert HealthMonitor().check(1, {"lm loss": 3.0, "z_loss": math.inf}) == []


@pytest.mark.parametrize("seed", range(3))
def test_rising_mtp_loss_is_reported(seed: int):
    curve = noisy(lambda t: (4 - t / 1000, 4.3 - min(t, 400) / 1000 + max(t - 400, 0) / 1000), 1200, 0.1, 0.05, seed)
    monitor = HealthMonitor()
    found = [text for step, losses in curve for text in monitor.check(step, losses) if " rose " in text]
    assert len(found) == 1
    assert "mtp_1 loss rose" in found[0]
    assert "Lower model.mtp_loss_scaling_factor" in found[0]
    step = int(found[0].split()[1].rstrip(":"))
    assert 480 <= step <= 1000  # 0.1 nat above its lowest at step 500, then the noise must be exceeded


def test_slow_rise_far_into_a_run_is_reported():
    found = watch(lambda t: (falling(t), falling(t) + 0.4 + max(t - 20_000, 0) / 20_000), 40_000)
    assert any("mtp_1 loss rose" in text for text in found)


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param(lambda t: (3.0, 3.5 + t / 1000, 3.8), id="MTP rises, main flat"),
        pytest.param(lambda t: (4 - t / 1000, 4.5, 4.2 - t / 1000), id="MTP stuck, main falls"),
        pytest.param(lambda t: (3.0 + t / 2000, 3.5 + t / 700, 3.8 + t / 2000), id="both rise, MTP more"),
        pytest.param(
            lambda t: (falling(t), falling(t) + 0.5 + 1.5 / (1 + math.exp((900 - t) / 30)), falling(t) + 0.7),
            id="after a healthy start",
        ),
    ],
)
def test_widening_gap_is_reported(curve: Curve):
    found = [text for text in watch(curve, 2000) if "the gap of mtp_1 loss" in text]
    assert len(found) == 1
    assert "Raise model.mtp_loss_scaling_factor" in found[0]


def test_gap_just_below_the_limit_is_silent():
    assert not any("gap" in text for text in watch(lambda t: (3.0, 3.5 + 0.9 * min(t / 1000, 1)), 2000))


def test_a_gap_that_widens_over_many_restarts_is_reported_as_without_them():
    """A job that is requeued every few steps would never see it from its own steps alone."""
    curve: Curve = lambda t: (3.0, 3.5 + t / 1000, 3.8)  # noqa: E731
    expected = watch(curve, 2000)
    assert any("the gap of mtp_1 loss" in text for text in expected)
    monitor, found = HealthMonitor(), []
    for step, losses in noisy(curve, 2000, 0.1, 0.05, 0):
        found += monitor.check(step, losses)
        if step % 33 == 0:  # within a window
            kept = json.dumps(monitor.state_dict())
            monitor = HealthMonitor()
            monitor.load_state_dict(json.loads(kept))
    assert found == expected


def stepwise(losses: Callable[[int], float], steps: int, warmup: float = 0.0, **metrics: float) -> list[str]:
    """What the signs after the warmup say of a main loss over steps of 8 samples, with constant other metrics."""
    monitor, source, found = HealthMonitor(signs_after_warmup(512, warmup)), random.Random(1), []
    for step in range(1, steps + 1):
        record = {"lm loss": losses(step) + source.gauss(0, 0.05), "consumed-samples": 8 * step, **metrics}
        found += monitor.check(step, record)
    return found


def test_a_loss_that_stays_above_chance_is_reported_once():
    (text,) = stepwise(lambda t: 6.3 + min(t, 30) / 30, 200)
    assert text.startswith("iteration 40: lm loss stays at 7.")
    assert "above ln 512 = 6.24" in text
    assert "lower optimizer.lr" in text
    (text,) = stepwise(lambda t: 7.0, 200, warmup=8 * 95)
    assert text.startswith("iteration 120: "), "windows within the warmup say nothing"


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(lambda t: 6.0, id="below"),
        pytest.param(lambda t: 9.0 - 0.02 * t, id="falls"),
        pytest.param(lambda t: falling(t) + 0.1, id="usual"),
    ],
)
def test_a_loss_below_chance_or_falling_is_silent(losses: Callable[[int], float]):
    assert stepwise(losses, 400) == []


DEAD = {"lm/top1_target": 0.04, "mtp_1/top1_main": 0.9995, "mtp_2/top1_main": 0.99}


def test_a_model_that_predicts_one_token_is_reported():
    (text,) = stepwise(lambda t: 6.0, 200, **DEAD)
    assert text.startswith("iteration 40: the MTP predictions agree with the main one at 99.0% of the slots")
    assert "right at 4.0%" in text
    assert "means nothing" in text
    assert "top1_target" in text


@pytest.mark.parametrize(
    "changed", [{"lm/top1_target": 0.6}, {"mtp_2/top1_main": 0.7}], ids=["it is right", "a depth differs"]
)
def test_agreement_that_means_something_is_silent(changed: dict[str, float]):
    assert stepwise(lambda t: 6.0, 200, **(DEAD | changed)) == []
    assert empty_agreement(DEAD | changed) is None


def test_an_early_model_that_still_learns_is_silent():
    assert stepwise(lambda t: 6.2 - 0.01 * t, 200, **DEAD) == []
