import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.data.shift import base_loss_mask, depth_targets, positions, segments
from megatron_mtp.data.zigzag import zigzag_index, zigzag_slice

pytestmark = pytest.mark.unit


@st.composite
def samples(draw):
    s = draw(st.integers(1, 24))
    tokens = np.array(draw(st.lists(st.integers(1, 99), min_size=s + 1, max_size=s + 1)))
    mask = np.array(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=s, max_size=s)), np.float32)
    starts = np.array(draw(st.lists(st.booleans(), min_size=s + 1, max_size=s + 1)))
    return tokens, mask, starts


def test_worked_example():
    out = depth_targets(np.array([5, 6, 7, 8, 9]), 2, np.array([1, 1, 0, 1]), segments(np.array([0, 0, 0, 0, 1])))
    assert out.shifted_ids.tolist() == [[6, 7, 8, 9], [7, 8, 9, 0]]
    assert out.labels.tolist() == [[6, 7, 8, 9], [7, 8, 9, 0], [8, 9, 0, 0]]
    # t[3] = 8 is masked, t[4] = 9 belongs to the next document
    assert out.loss_mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@given(samples(), st.integers(0, 6), st.booleans())
def test_each_entry_follows_the_definition(sample, num_depths, separate):
    tokens, mask, starts = sample
    s = len(mask)
    documents = segments(starts)
    out = depth_targets(tokens, num_depths, mask, documents if separate else None)
    for k in range(1 + num_depths):
        for i in range(s):
            target = i + k + 1
            inside = target <= s
            one_document = not separate or (inside and len(set(documents[i : target + 1])) == 1)
            assert out.labels[k, i] == (tokens[target] if inside else 0)
            assert out.loss_mask[k, i] == (mask[target - 1] if inside and one_document else 0)
            if k:
                assert out.shifted_ids[k - 1, i] == (tokens[i + k] if i + k <= s else 0)


@given(samples(), st.integers(1, 5), st.integers(1, 5))
def test_shifts_compose(sample, first, second):
    """Depth a+b of a sample is depth b of the sample without its first a tokens."""
    tokens, mask, starts = sample
    if len(mask) <= first:
        return
    complete = depth_targets(tokens, first + second, mask, segments(starts))
    rest = depth_targets(tokens[first:], second, mask[first:])
    s = len(mask) - first
    assert (complete.labels[first + second, :s] == rest.labels[second]).all()
    assert (complete.shifted_ids[first + second - 1, :s] == rest.shifted_ids[second - 1]).all()


@given(samples(), st.integers(0, 5))
def test_counts_by_depth_and_document(sample, num_depths):
    """A document of n tokens in the sample has max(0, n - 1 - k) targets at depth k."""
    tokens, mask, starts = sample
    documents = segments(starts)
    out = depth_targets(tokens, num_depths, np.ones_like(mask), documents)
    for k in range(1 + num_depths):
        for document in range(documents[-1] + 1):
            slots = out.loss_mask[k][documents[:-1] == document]
            assert slots.sum() == max(0, (documents == document).sum() - 1 - k)


def test_leading_axes_are_kept():
    tokens = np.arange(2 * 3 * 6).reshape(2, 3, 6)
    out = depth_targets(tokens, 2, np.ones((2, 3, 5)))
    assert out.labels.shape == out.loss_mask.shape == (3, 2, 3, 5)
    assert out.shifted_ids.shape == (2, 2, 3, 5)
    one = depth_targets(tokens[1, 2], 2, np.ones(5))
    assert (out.labels[:, 1, 2] == one.labels).all()
    assert (out.shifted_ids[:, 1, 2] == one.shifted_ids).all()


def test_positions_and_base_mask():
    starts = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], bool)
    assert positions(starts, False).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert positions(starts, True).tolist() == [[0, 0, 1, 0, 1], [0, 1, 2, 3, 0]]
    assert segments(starts).tolist() == [[0, 1, 1, 2, 2], [0, 0, 0, 0, 1]]
    assert base_loss_mask(starts, True).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]
    assert base_loss_mask(starts, False).tolist() == [[1] * 4] * 2


@given(st.integers(1, 8), st.integers(1, 4))
def test_zigzag_slices_partition_the_sequence_and_mirror(cp_size, chunk):
    s = 2 * cp_size * chunk
    parts = [zigzag_index(s, rank, cp_size) for rank in range(cp_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(s))
    assert all(part.sum() == parts[0].sum() for part in parts)  # equal work under a causal mask


def test_zigzag_is_megatron_cores():
    x = np.arange(2 * 16).reshape(2, 16)
    view = x.reshape(2, 4, 4)  # 2*cp chunks for cp = 2, as get_batch_on_this_cp_rank takes them
    for rank in range(2):
        expected = view[:, [rank, 3 - rank]].reshape(2, 8)
        assert (zigzag_slice(x, rank, 2) == expected).all()
