"""The train state survives JSON, refuses what it does not know, and counts without overflow."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, TRAIN_STATE_NAME, Manifest
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.errors import CheckpointError
from tests.checkpoint.writing import describe_file, write_checkpoint

pytestmark = pytest.mark.unit


def test_every_field_survives_json():
    state = TrainState(
        iteration=7,
        consumed_samples=2**40,
        consumed_tokens=2**62,
        skipped_iterations=1,
        nan_iterations=2,
        skips_in_row=3,
        rollbacks=1,
        passed_over_samples=64,
        elapsed_s=1.5,
        floating_point_operations=1e24,
        best_validation_loss=0.1,
        best_metric="docs/lm loss",
        phases=[{"name": "long", "iteration": 5, "samples": 2, "tokens": 8, "data": 3, "changes": {"a.b": [1, 2]}}],
        has_open_evaluation=True,
        acceptance={"matches_target": [2**63, 1]},
        wandb_run_id="abc",
        health={"gap": {"mtp_1": 0.5}},
        callbacks={"replicas": {"checks": 3}},
    )
    default = TrainState()
    assert all(getattr(state, f.name) != getattr(default, f.name) for f in fields(state)), "give each field a value"
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0446, "0.0446 s"), (119.6, "120 s"), (150, "2.5 min"), (7200, "2.0 h"), (1e6, "277.8 h")]
)
def test_the_totals_choose_the_unit_of_time(seconds: float, said: str):
    assert f", {said} in steps, " in TrainState(elapsed_s=seconds).totals()


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)), min_size=1))
def test_acceptance_counters_add_without_overflow(steps):
    state = TrainState()
    for first, second in steps:
        state.add_acceptance({"matches_main": [first, second]})
    assert state.acceptance == {"matches_main": [sum(s[0] for s in steps), sum(s[1] for s in steps)]}


def test_acceptance_of_another_depth_count_is_refused():
    state = TrainState(acceptance={"matches_main": [1, 2]})
    with pytest.raises(ValueError, match="2 depths, but 1"):
        state.add_acceptance({"matches_main": [1]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iteration": 1, "momentum": 3}, "momentum = 3 is unknown"),
        ({"iteration": "1"}, "iteration = '1' should be int"),
        ({"iteration": True}, "iteration = True should be int"),
        ({"iteration": 1.0}, "iteration = 1.0 should be int"),
        ({"iteration": -1}, "iteration = -1 should be int of at least 0"),
        ({"elapsed_s": math.nan}, "elapsed_s = nan should be float of at least 0"),
        ({"best_validation_loss": math.inf}, "best_validation_loss = inf should be float"),
        ({"acceptance": {"matches_main": [1, -2]}}, "acceptance = .* should be lists of counts"),
        ({"wandb_run_id": 5}, "wandb_run_id = 5 should be str"),
    ],
)
def test_what_is_not_known_is_refused_and_nothing_is_taken(values, message):
    state = TrainState(iteration=9)
    with pytest.raises(CheckpointError, match=message):
        state.restore(values)
    assert state == TrainState(iteration=9)


def test_a_field_the_checkpoint_lacks_keeps_its_value():
    state = TrainState(wandb_run_id="kept")
    state.restore({"iteration": 3})
    assert (state.iteration, state.wandb_run_id) == (3, "kept")


def test_advance_counts_tokens():
    state = TrainState()
    state.advance(samples=8, seq_length=64)
    state.advance(samples=16, seq_length=64)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (2, 24, 24 * 64)


def test_what_was_handed_out_does_not_go_on_counting():
    """An asynchronous save writes it several steps later; a run killed then would count those steps twice."""
    state = TrainState()
    state.add_acceptance({"matches_target": [5, 2]})
    handed_out = state.to_dict()
    state.add_acceptance({"matches_target": [5, 2]})
    assert handed_out["acceptance"] == {"matches_target": [5, 2]}


def edited(**values: Any) -> str:
    return json.dumps(
        {"train": TrainState(iteration=200, consumed_samples=800).to_dict() | values.pop("train", {})}
        | {"optimizer": {"step": 200, "grad_scaler": None}}
        | values
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (edited(train={"consumed_samples": -5}), "consumed_samples = -5 should be"),
        (edited(train={"iteration": 999}), "iteration = 999, but the manifest says 200"),
        (edited(train={"consumed_samples": 4}), "consumed_samples = 4, but the manifest says 800"),
        (edited(train={"floating_point_operations": 10**400}), "should be float of at least 0"),
        (edited(optimizer=None), "parts train and optimizer"),
        (edited(optimizer={}), "step = '' should be"),
        (edited(optimizer={"step": -1, "grad_scaler": None}), "step = -1 should be"),
        (edited(optimizer={"step": 1, "grad_scaler": {"scale": "1"}}), "should be numbers by name"),
        ('{"train": {}, "optimizer": {}}', "lacks iteration, consumed_samples, consumed_tokens"),
        ("[]", "parts train and optimizer"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "is damaged"),
    ],
    ids=range(12),
)
def test_a_file_without_sense_is_damage(tmp_path: Path, content: str, what: str):
    """Its checksum is right: who edits a file by hand, or attacks, writes the manifest again."""
    write_checkpoint(tmp_path, 100)
    whole = write_checkpoint(tmp_path, 200)
    (whole / TRAIN_STATE_NAME).write_text(content)
    entries = [describe_file(file) for file in whole.iterdir() if file.name != MANIFEST_NAME]
    manifest = Manifest(iteration=200, files=entries, consumed_samples=800)
    (whole / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    found, problems = RunDirectory(tmp_path).newest_listed()
    assert found.iteration == 100
    assert len(problems) == 1
    assert f"{whole / TRAIN_STATE_NAME}: is damaged (" in problems[0]
    assert what in problems[0]
