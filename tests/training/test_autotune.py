"""The rule that changes the loss factor: lowered, raised, brought back; the same over a restart and on every rank."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.training.autotune import HIGHEST, LOWEST, WAIT_STEPS, LossFactorTuner
from tests.training.test_pretrain import tiny

unit = pytest.mark.unit


def losses(step: int, source: random.Random, kind: str, onset: int = 200, end: int = 10_000) -> dict[str, float]:
    """A record of a run that is healthy until `onset` and after `end`."""
    shared, is_bad = source.gauss(0, 0.05), onset <= step < end
    main, mtp, share = 4 - step / 2000, 4.5 - step / 2000, 0.2
    if is_bad and kind == "diverges":
        mtp = 4.5 + (step - onset) / 100
    if is_bad and kind == "overshadowed":
        share = 0.95
    if is_bad and kind == "gap":
        main, mtp = main - min((step - onset) / 50, 2), 4.5 - onset / 2000
    record = {"lm loss": main + shared, "mtp_1 loss": mtp + shared + source.gauss(0, 0.02)}
    return record | ({"mtp/gradient_share": share + source.gauss(0, 0.01)} if step % 10 == 0 else {})


def scales(kind: str, steps: int, restart_every: int | None = None, **when: int) -> list[tuple[int, float]]:
    """(iteration, scale) of each change."""
    tuner, source, found = LossFactorTuner(1), random.Random(1), []
    for step in range(1, steps + 1):
        if text := tuner.step(step, losses(step, source, kind, **when)):
            assert text.startswith(f"iteration {step}: train.mtp_autotune: ")
            found.append((step, tuner.scale))
        if restart_every and step % restart_every == 0:
            kept = json.dumps(tuner.state_dict())
            tuner = LossFactorTuner(1)
            tuner.load_state_dict(json.loads(kept))
    return found


@unit
def test_a_healthy_run_keeps_its_factor():
    assert scales("healthy", 2000) == []


@unit
@pytest.mark.parametrize("kind", ["diverges", "overshadowed"])
def test_the_factor_is_halved_until_it_is_at_its_lowest(kind: str):
    found = scales(kind, 1500)
    assert 200 < found[0][0] <= 260
    assert [scale for _, scale in found] == [0.5, 0.25, 0.125, LOWEST]
    assert all(b - a >= WAIT_STEPS for (a, _), (b, _) in pairwise(found))


@unit
def test_a_depth_that_stays_behind_raises_it():
    found = scales("gap", 800)
    assert [scale for _, scale in found] == [1.5, HIGHEST]


@unit
def test_the_factor_comes_back_when_the_run_is_healthy_again():
    found = scales("overshadowed", 3000, end=450)
    assert [scale for _, scale in found] == [0.5, 0.25, 0.125, 0.25, 0.5, 1.0]


@unit
def test_restarts_change_nothing():
    assert scales("overshadowed", 3000, restart_every=17, end=450) == scales("overshadowed", 3000, end=450)


@unit
def test_a_model_without_mtp_has_nothing_to_tune():
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe("tiny_dense")
    cfg.model.mtp_num_layers, cfg.train.mtp_autotune = 0, True
    with pytest.raises(ConfigError, match=r"train\.mtp_autotune = True: with model\.mtp_num_layers = 0"):
        cfg.finalize(1)


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_lowers_its_factor_and_goes_on_after_a_resume(tmp_path: Path):
    from megatron_mtp import pretrain

    scales = []
    for iters in (110, 205):
        cfg = tiny(tmp_path, train_iters=iters, global_batch_size=2, micro_batch_size=2)
        cfg.model.update(num_layers=1, mtp_num_layers=1, hidden_size=32, seq_length=16, mtp_loss_scaling_factor=100.0)
        cfg.train.mtp_autotune = True
        cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
        cfg.validation.eval_iters = 0
        scales.append(pretrain(cfg).state.health["autotune"]["scale"])
    assert scales == [0.5, 0.25]
    changes = read_metrics(tmp_path / "metrics.jsonl", "autotune")
    assert [line["iteration"] for line in changes] == [100, 200]
    factors = [step["mtp/loss_scaling_factor"] for step in read_metrics(tmp_path / "metrics.jsonl")]
    assert factors == [100.0] * 100 + [50.0] * 100 + [25.0] * 5
