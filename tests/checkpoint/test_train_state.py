"""The train state survives JSON, refuses what it does not know, and counts without overflow."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.errors import CheckpointError

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
        acceptance={"matches_target": [2**63, 1]},
        wandb_run_id="abc",
        health={"gap": {"mtp_1": 0.5}},
        callbacks={"replicas": {"checks": 3}},
    )
    default = TrainState()
    assert all(getattr(state, f.name) != getattr(default, f.name) for f in fields(state)), "give each field a value"
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


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
