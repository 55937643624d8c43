import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.data.order import BatchSchedule, batch_positions, epoch_samples, local_positions
from megatron_mtp.data.randomness import derive_key, permute, uniform

pytestmark = pytest.mark.unit


def megatron_ramp(consumed, start, increment, ramp_samples, global_batch_size):
    """RampupBatchsizeNumMicroBatchesCalculator.update of Megatron-Core 0.14, which 0.19 no longer has."""
    num_increments = (global_batch_size - start) // increment
    if num_increments == 0 or consumed > ramp_samples:
        return global_batch_size
    return start + int(consumed / (ramp_samples / num_increments)) * increment


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 6), st.integers(1, 500), st.integers(0, 700))
def test_ramp_is_megatrons(start, increment, increments, samples, consumed):
    size = start + increments * increment
    schedule = BatchSchedule(size, (start, increment, samples))
    ours, theirs = schedule.size_at(consumed), megatron_ramp(consumed, start, increment, samples, size)
    if increments and consumed <= samples and (consumed * increments) % samples == 0:
        assert theirs in (ours, ours - increment)  # their float division may fall just below the integer
    else:
        assert ours == theirs
    assert ours in schedule.sizes()


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 60), st.integers(0, 60))
def test_resuming_continues_the_same_batches(start, increments, samples, steps):
    schedule = BatchSchedule(start + 2 * increments, (start, 2, samples))
    complete = [(step, list(pos)) for step, pos in itertools.islice(batch_positions(schedule), steps + 5)]
    consumed = sum(len(pos) for _, pos in complete[:steps])
    assert schedule.consumed_after(steps) == consumed
    assert schedule.step_at(consumed) == steps
    again = [(step, list(pos)) for step, pos in itertools.islice(batch_positions(schedule, consumed), 5)]
    assert again == complete[steps:]
    flat = [position for _, positions in complete for position in positions]
    assert flat == list(range(len(flat)))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_local_positions_follow_megatrons_rule(micro_batches, dp_size, micro_batch_size):
    size = micro_batches * dp_size * micro_batch_size
    seen = []
    for rank in range(dp_size):
        places = local_positions(size, micro_batch_size, rank, dp_size)
        assert places.shape == (micro_batches, micro_batch_size)
        for m, j in np.ndindex(places.shape):
            assert places[m, j] == m * micro_batch_size * dp_size + rank * micro_batch_size + j
        seen += places.ravel().tolist()
    assert sorted(seen) == list(range(size))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_one_to_one(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_handles_huge_ranges_and_looks_random():
    size = 3_700_000_000_000
    index = np.arange(1000) + size - 1000
    out = permute(index, size, 7)
    assert len(set(out.tolist())) == 1000
    assert out.min() >= 0
    assert out.max() < size
    # Each third of a small range lands evenly on each third; the expected count is 333, its deviation about 12.
    out = permute(np.arange(3000), 3000, derive_key(1, "x"))
    for a, b in itertools.product(range(3), range(3)):
        landed = ((out[a * 1000 : (a + 1) * 1000] // 1000) == b).sum()
        assert 270 < landed < 400
    assert abs(np.corrcoef(np.arange(3000), out)[0, 1]) < 0.06


def test_uniform_covers_the_unit_interval():
    x = uniform(np.arange(20000), 3)
    assert (np.histogram(x, 10, (0, 1))[0] > 1800).all()
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.03


def test_the_order_never_changes_between_releases():
    """A frozen sample of the order: a change here breaks every resumed run."""
    assert permute(np.arange(8), 10, derive_key(1234, "train", "epoch", 0)).tolist() == [6, 4, 3, 2, 1, 5, 7, 9]
    assert derive_key(1, "a") == 17695650510506908520


def test_epochs_are_permutations_that_differ():
    draws = epoch_samples(np.arange(300), 100, 5, "x").reshape(3, 100)
    assert (np.sort(draws, axis=1) == np.arange(100)).all()
    assert not (draws[0] == draws[1]).all()
    assert not (draws[0] == epoch_samples(np.arange(100), 100, 5, "y")).all()
    assert (epoch_samples(np.array([250, 3]), 100, 5, "x") == [draws[2, 50], draws[0, 3]]).all()
