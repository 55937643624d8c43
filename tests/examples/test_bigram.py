import math

import numpy as np
import pytest

from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.examples.bigram import _ALPHAS, distance_bigram_loss, unigram_loss

pytestmark = pytest.mark.unit
VOCAB = 12


def write(prefix, documents):
    writer = IndexedWriter(str(prefix), np.uint16)
    for document in documents:
        writer.write(np.array(document), np.array([len(document)]))
    writer.close()
    return str(prefix)


def joined(documents):
    return [token for document in documents for token in document]


def brute_force(train, test, distance, alpha):
    """Straight from the definition, pair by pair."""
    pairs = [(train[i], train[i + distance]) for i in range(len(train) - distance)]
    total = 0.0
    for i in range(len(test) - distance):
        a, b = test[i], test[i + distance]
        together = sum(pair == (a, b) for pair in pairs)
        first = sum(pair[0] == a for pair in pairs)
        unigram = (sum(pair[1] == b for pair in pairs) + 1) / (len(pairs) + VOCAB)
        total -= math.log((together + alpha * unigram) / (first + alpha))
    return total / (len(test) - distance)


@pytest.mark.parametrize("distance", [1, 2, 4])
def test_equals_brute_force(tmp_path, distance):
    rng = np.random.default_rng(distance)
    train = [rng.integers(0, VOCAB - 2, length).tolist() for length in rng.integers(1, 12, 25)]
    valid = [rng.integers(0, VOCAB, length).tolist() for length in (9, 1, 20)]
    chosen = joined(train[::10])
    rest = joined(document for i, document in enumerate(train) if i % 10)
    alpha = min(_ALPHAS, key=lambda alpha: brute_force(rest, chosen, distance, alpha))
    expected = brute_force(joined(train), joined(valid), distance, alpha)
    loss = distance_bigram_loss(write(tmp_path / "t", train), write(tmp_path / "v", valid), distance, VOCAB)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_a_deterministic_chain_is_learnt_and_noise_is_not(tmp_path):
    rng = np.random.default_rng(0)
    chain = [[(start + i) % VOCAB for i in range(200)] for start in range(20)]
    noise = [rng.integers(0, VOCAB, 200).tolist() for _ in range(20)]
    for distance in (1, 3):
        learnt = distance_bigram_loss(write(tmp_path / "a", chain), write(tmp_path / "b", chain[:5]), distance, VOCAB)
        assert learnt < 0.1
        loss = distance_bigram_loss(write(tmp_path / "c", noise), write(tmp_path / "d", noise[:1]), distance, VOCAB)
        assert loss == pytest.approx(math.log(VOCAB), abs=0.1)


def test_a_unigram_table_is_counted_by_hand(tmp_path):
    train, valid = write(tmp_path / "t", [[0, 1, 1], [2]]), write(tmp_path / "v", [[1, 3]])
    expected = -(math.log(3 / 16) + math.log(1 / 16)) / 2
    assert unigram_loss(train, valid, VOCAB) == pytest.approx(expected, rel=1e-12)
