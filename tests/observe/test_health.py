"""Each sign begins and ends on an unhealthy curve, and never on healthy ones, noise included."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from megatron_mtp.observe.health import HealthMonitor, SignEvent
from megatron_mtp.observe.signs import built_in_signs, empty_agreement, signs_after_warmup
from megatron_mtp.observe.trends import MAX_WINDOWS, Level, Series, Trends, Window

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


def watch(curve: Curve, steps: int, shared: float = 0.1, own: float = 0.05, seed: int = 0) -> list[SignEvent]:
    monitor = HealthMonitor(built_in_signs(len(curve(1)) - 1))
    return [event for step, losses in noisy(curve, steps, shared, own, seed) for event in monitor.check(step, losses)]


def begun(events: list[SignEvent]) -> dict[str, int]:
    """Sign -> iteration at which it began, each at most once."""
    found = [(event.sign, event.iteration) for event in events if event.begins]
    assert len(found) == len(dict(found)), found
    return dict(found)


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
    for seed in range(2):
        assert watch(HEALTHY[name], 1500, shared, own, seed) == []


@pytest.mark.slow  # ten seconds
def test_a_long_noisy_run_is_silent():
    assert watch(HEALTHY["usual"], 100_000, shared=0.2, own=0.1) == []


def record(step: int, source: random.Random, **changed: float) -> dict[str, float]:
    """All metrics of a step of a healthy run that learns slowly, with noise, and some set to other values."""
    shared = source.gauss(0, 0.08)
    metrics = {
        "consumed-samples": 8 * step,
        "lm loss": falling(step + 100) + shared + source.gauss(0, 0.03),
        "mtp_1 loss": falling(step + 100) + 0.4 + shared + source.gauss(0, 0.03),
        "grad-norm": math.exp(source.gauss(0, 0.2)),
        "nan-iterations": 0,
        "lm/top1_target": 0.40 + source.gauss(0, 0.01),
        "mtp_1/top1_main": 0.5 + source.gauss(0, 0.01),
        "mtp_1/top1_target": 0.30 + source.gauss(0, 0.01),
        "mtp_1/accepted": 0.60 + source.gauss(0, 0.01),
        "learning-rate": 1e-3,
        "perf/data_ms": 0.5 * math.exp(source.gauss(0, 0.5)),
        "perf/iteration_time_ms": 50 * math.exp(source.gauss(0, 0.1)),
    }
    if step % 10 == 0:
        metrics |= {
            "mtp/gradient_share": 0.2 + source.gauss(0, 0.02),
            "mtp_1/weight_change": 1e-6 * abs(source.gauss(0, 1)),
            "moe/max_load": 1.8 + source.gauss(0, 0.1),
            "moe/min_load": 0.4 + source.gauss(0, 0.05),
        }
    return metrics | {name: value for name, value in changed.items() if name in metrics}


ONSET, OVER = 305, 560
BAD: dict[str, Callable[[int, float], dict[str, float]]] = {
    "not finite": lambda t, noise: {"mtp_1 loss": math.nan},
    "spikes": lambda t, noise: {"lm loss": falling(t + 100) + 2.0 * (t % 6 == 0) + noise},
    "mtp rises: mtp_1": lambda t, noise: {"mtp_1 loss": falling(ONSET + 100) + 0.4 + 0.02 * (t - ONSET) + noise},
    "gap widens: mtp_1": lambda t, noise: {"lm loss": 3.0 + noise, "mtp_1 loss": 5.5 + noise},
    "mtp stalls: mtp_1": lambda t, noise: {
        "lm loss": falling(t + 100) - 0.03 * min(t - ONSET, 50) + noise,
        "mtp_1 loss": falling(ONSET + 100) + 0.4 + noise,
    },
    "mtp frozen: mtp_1": lambda t, noise: {"mtp_1/weight_change": 0.0},
    "main overshadowed": lambda t, noise: {"mtp/gradient_share": 0.9 + noise / 10},
    "acceptance falls: mtp_1": lambda t, noise: {"mtp_1/accepted": 0.4 + noise / 10, "mtp_1/top1_target": 0.2},
    "grad norm drifts": lambda t, noise: {"grad-norm": 20 * math.exp(noise)},
    "experts imbalanced": lambda t, noise: {"moe/min_load": 0.0},
    "data stalls": lambda t, noise: {"perf/data_ms": 30 * math.exp(noise)},
}
"""Sign -> the metrics of an unhealthy step."""


def run_with(name: str, restarts: Callable[[int], bool] = lambda step: False, steps: int = 700) -> list[SignEvent]:
    """A run that is unhealthy from ONSET to OVER."""
    monitor, source, events = HealthMonitor(built_in_signs(1)), random.Random(7), []
    for step in range(1, steps + 1):
        changed = BAD[name](step, source.gauss(0, 0.03)) if ONSET <= step < OVER else {}
        events += monitor.check(step, record(step, source, **changed))
        if restarts(step):
            kept = json.dumps(monitor.state_dict())
            monitor = HealthMonitor(built_in_signs(1))
            monitor.load_state_dict(json.loads(kept))
    return events


@pytest.mark.parametrize("name", BAD)
def test_a_sign_begins_within_50_steps_and_ends(name: str):
    events = run_with(name)
    mine = [event for event in events if event.sign == name]
    assert [event.begins for event in mine][:2] == [True, False]
    assert ONSET <= mine[0].iteration <= ONSET + 50
    assert OVER <= mine[1].iteration <= OVER + 90
    assert mine[0].text.startswith(f"iteration {mine[0].iteration}: ")
    assert f"reported at iteration {mine[0].iteration}" in mine[1].text
    assert len(mine) == 2


@pytest.mark.parametrize("name", BAD)
def test_restarts_change_nothing(name: str):
    """A job that is requeued every few steps would never see a slow change from its own steps alone."""
    assert run_with(name, restarts=lambda step: step % 33 == 0) == run_with(name)


def test_a_healthy_record_is_silent():
    monitor, source = HealthMonitor(built_in_signs(1) | signs_after_warmup(512, 80)), random.Random(3)
    assert [e for step in range(1, 3000) for e in monitor.check(step, record(step, source))] == []


def test_the_state_is_bounded():
    monitor, source, sizes = HealthMonitor(built_in_signs(1)), random.Random(3), []
    for step in range(1, 8_001):
        layers = {f"moe/max_load_layer_{k}": source.gauss(2, 0.1) for k in range(60)}
        monitor.check(step, record(step, source) | layers)
        if step in (3_000, 8_000):
            sizes.append(len(json.dumps(monitor.state_dict())))
    assert sizes[1] < 100_000
    assert sizes[1] < 1.5 * sizes[0]


def test_the_state_of_an_older_release_is_taken_as_none():
    old = {"steps": [{"lm loss": 3.0}], "windows": [{"metrics": {"lm loss": [3.0, 0.1]}, "gap": {}}], "reported": []}
    monitor = HealthMonitor()
    monitor.load_state_dict(old)
    assert monitor.state_dict() == HealthMonitor().state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm loss", "mtp_2 loss"])
def test_not_a_number_is_reported_once_and_at_once(name: str, bad: float):
    monitor = HealthMonitor()
    losses = {"lm loss": 3.0, "mtp_1 loss": 3.5, "mtp_2 loss": 3.9}
    assert monitor.check(1, losses) == []
    (event,) = monitor.check(2, losses | {name: bad})
    assert event.text.startswith(f"iteration 2: {name} is {bad}")
    for advice in ("optimizer.lr", "optimizer.clip_grad", "bf16", "mtp_loss_scaling_factor"):
        assert advice in event.text
    assert monitor.check(3, losses | {name: bad}) == []


def test_a_gradient_that_is_not_finite_is_reported():
    (event,) = HealthMonitor().check(1, {"lm loss": 3.0, "nan-iterations": 1})
    assert "the gradient is not finite" in event.text


def test_router_losses_are_not_watched():
    assert HealthMonitor().check(1, {"lm loss": 3.0, "z_loss": math.inf}) == []


@pytest.mark.parametrize("seed", range(3))
def test_rising_mtp_loss_is_reported(seed: int):
    def curve(t: int) -> tuple[float, float]:
        return 4 - t / 1000, 4.3 - min(t, 400) / 1000 + max(t - 400, 0) / 1000

    events = watch(curve, 1200, seed=seed)
    at = begun(events)["mtp rises: mtp_1"]
    assert 480 <= at <= 1000  # 0.1 nat above its lowest at step 500, then the noise must be exceeded
    (text,) = [event.text for event in events if event.sign == "mtp rises: mtp_1"]
    assert "mtp_1 loss rose" in text
    assert "Lower model.mtp_loss_scaling_factor" in text


def test_slow_rise_far_into_a_run_is_reported():
    found = watch(lambda t: (falling(t), falling(t) + 0.4 + max(t - 20_000, 0) / 20_000), 40_000)
    assert "mtp rises: mtp_1" in begun(found)


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
    events = watch(curve, 2000)
    assert [event.sign for event in events if event.begins and event.sign.startswith("gap")] == ["gap widens: mtp_1"]
    assert any("Raise model.mtp_loss_scaling_factor" in event.text for event in events)


def test_gap_just_below_the_limit_is_silent():
    events = watch(lambda t: (3.0, 3.5 + 0.9 * min(t / 1000, 1)), 2000)
    assert not any(event.sign.startswith("gap") for event in events)


def test_memorising_is_a_rise_of_validation_while_training_falls():
    def events_of(valid: Callable[[int], float], train: Callable[[int], float]) -> list[SignEvent]:
        monitor, source, events = HealthMonitor(), random.Random(1), []
        for step in range(1, 601):
            events += monitor.check(step, {"lm loss": train(step) + source.gauss(0, 0.05)})
            if step % 20 == 0:
                events += monitor.check_evaluation("validation", step, {"lm loss": valid(step)})
        return events

    def falls(step: int) -> float:
        return 4 - step / 300

    def turns(step: int) -> float:
        return max(4 - step / 300, 3.0) + max(step - 300, 0) / 300

    events = events_of(turns, falls)
    assert begun(events)["memorising: validation"] in range(340, 401)
    assert "learns its data by heart" in events[0].text
    assert events_of(falls, falls) == []
    assert events_of(turns, turns) == [], "a run that gets worse in training too does not learn by heart"


def stepwise(losses: Callable[[int], float], steps: int, warmup: float = 0.0, **metrics: float) -> list[SignEvent]:
    """What the signs after the warmup say of a main loss over steps of 8 samples, with constant other metrics."""
    monitor, source, found = HealthMonitor(signs_after_warmup(512, warmup)), random.Random(1), []
    for step in range(1, steps + 1):
        values = {"lm loss": losses(step) + source.gauss(0, 0.05), "consumed-samples": 8 * step, **metrics}
        found += monitor.check(step, values)
    return found


def test_a_loss_that_stays_above_chance_is_reported_once():
    (event,) = stepwise(lambda t: 6.3 + min(t, 30) / 30, 200)
    assert event.sign == "worse than chance"
    assert event.text.startswith("iteration 50: lm loss stays at 7.")
    assert "above ln 512 = 6.24" in event.text
    assert "lower optimizer.lr" in event.text
    (event,) = stepwise(lambda t: 7.0, 200, warmup=8 * 95)
    assert event.iteration > 95, "windows within the warmup say nothing"


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
    (event,) = stepwise(lambda t: 6.0, 200, **DEAD)
    assert event.text.startswith("iteration 50: the MTP predictions agree with the main one at 99.0% of the slots")
    assert "right at 4.0%" in event.text
    assert "means nothing" in event.text
    assert "top1_target" in event.text


@pytest.mark.parametrize(
    "changed", [{"lm/top1_target": 0.6}, {"mtp_2/top1_main": 0.7}], ids=["it is right", "a depth differs"]
)
def test_agreement_that_means_something_is_silent(changed: dict[str, float]):
    assert stepwise(lambda t: 6.0, 200, **(DEAD | changed)) == []
    assert empty_agreement(DEAD | changed) is None


def test_an_early_model_that_still_learns_is_silent():
    assert stepwise(lambda t: 6.2 - 0.01 * t, 200, **DEAD) == []


def normal(source: random.Random) -> float:
    return source.gauss(0, 1)


def heavy_tails(source: random.Random) -> float:
    """Student's t with three degrees of freedom."""
    return source.gauss(0, 1) / math.sqrt(source.gammavariate(1.5, 2) / 3)


@pytest.mark.parametrize("noise", [normal, heavy_tails])
def test_levels_of_pure_noise_rarely_differ(noise: Callable[[random.Random], float]):
    """20,000 comparisons of independent windows with a common level: less than 1 in 10,000 is significant."""
    source, trends, windows = random.Random(11), Trends(), []
    for step in range(1, 20_001):
        trends.add(step, {"x": noise(source)})
        if step % 20 == 0 and step > 200:
            windows.append(trends.window(step).metrics["x"])
    pairs = [(a, windows[i - lag]) for lag in range(1, 21) for i, a in enumerate(windows) if i >= lag]
    assert len(pairs) > 19_000
    assert sum(a.above(b) > 0 for a, b in pairs) <= 2


def test_the_error_of_a_level_is_that_of_a_median_with_and_without_a_trend():
    for slope in (0.0, 0.05):
        source, found, errors = random.Random(5), [], []
        for _ in range(300):
            series = Series()
            for step in range(1, 101):
                series.add(step, slope * step + source.gauss(0, 1))
            level = series.level()
            assert level is not None
            found.append(level.value)
            errors.append(level.error)
        mean = math.fsum(found) / len(found)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in found) / len(found))
        assert math.fsum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


def test_a_spike_moves_neither_level_nor_noise():
    calm, spiky, source = Series(), Series(), random.Random(2)
    for step in range(1, 101):
        value = source.gauss(0, 1)
        calm.add(step, value)
        spiky.add(step, value + 1000 * (step == 95))
    before, after = calm.level(), spiky.level()
    assert before is not None
    assert after is not None
    assert abs(after.value - before.value) < 0.5
    assert after.error < 1.3 * before.error


def test_the_history_is_sparser_the_older_it_is():
    trends = Trends()
    for step in range(20, 40_001, 20):
        trends.keep(Window(step, {"x": Level(0.0, 0.0)}))
    steps = [window.step for window in trends.history]
    assert len(steps) <= MAX_WINDOWS
    assert steps[0] == 20
    assert steps[-1] - steps[-2] <= steps[1] - steps[0]


@pytest.mark.parametrize("interval", [10, 50, 100])
def test_a_metric_that_is_measured_rarely_begins_and_ends_a_sign_once(interval: int):
    monitor, source, events = HealthMonitor(built_in_signs(0)), random.Random(1), []
    for step in range(1, 3001):
        share = (0.9 if 1000 <= step < 2000 else 0.2) + source.gauss(0, 0.01)
        rare = {"mtp/gradient_share": share} if step % interval == 0 else {}
        events += monitor.check(step, {"lm loss": 3.0 + source.gauss(0, 0.1)} | rare)
    assert [(event.sign, event.begins) for event in events] == [
        ("main overshadowed", True),
        ("main overshadowed", False),
    ]
    assert events[0].iteration <= 1000 + 3 * interval
