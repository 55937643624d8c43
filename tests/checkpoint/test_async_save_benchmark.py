"""The benchmark of asynchronous saves can pass with its defaults, and says why it does not."""

from __future__ import annotations

import pytest

from benchmarks.async_save import LIMIT, MIN_BYTES, STEPS_OF_A_SAVE, STEPS_WHILE_SAVING, failures, parser

pytestmark = pytest.mark.unit


def test_the_defaults_give_enough_steps_during_a_save():
    options = parser().parse_args([])
    assert options.saves * STEPS_OF_A_SAVE >= STEPS_WHILE_SAVING
    assert options.interval > 2 * STEPS_OF_A_SAVE, "as many steps without a save"


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ((MIN_BYTES, STEPS_WHILE_SAVING, 1.1), []),
        ((MIN_BYTES - 1, STEPS_WHILE_SAVING, 1.1), ["raise --hidden"]),
        ((MIN_BYTES, 12, 1.1), ["12 of 20 steps ran during a save: raise --saves"]),
        ((MIN_BYTES, STEPS_WHILE_SAVING, LIMIT), ["1.150 times as long"]),
        ((0, 0, 2.0), ["--hidden", "--saves", "2.000"]),
    ],
)
def test_it_says_what_is_missing(measured: tuple[float, int, float], said: list[str]):
    found = failures(*measured)
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))
