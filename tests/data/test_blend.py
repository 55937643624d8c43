import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtp.config.blend import Blend, parse_blend
from megatron_mtp.data.blend import BlendedSource, draw
from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.sources import open_sources
from megatron_mtp.data.uses import corpus_uses
from megatron_mtp.errors import ConfigError, DataError
from megatron_mtp.recipes import get_recipe
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit
weights_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[f"dclm_{i:02d}" for i in range(1, 11)], None], Blend(tuple(f"dclm_{i:02d}" for i in range(1, 11)), None)),
        ([["a", "b"], [0.25, 0.75]], Blend(("a", "b"), (0.25, 0.75))),
        ([["a", "b"]], Blend(("a", "b"), None)),
        (["a"], Blend(("a",), None)),
        (["a", "b"], Blend(("a", "b"), None)),
        (["30", "a", "70", "b"], Blend(("a", "b"), (30.0, 70.0))),
        ([30, "a", 70, "b"], Blend(("a", "b"), (30.0, 70.0))),
        ([0.7, "a", 0.3, "b"], Blend(("a", "b"), (0.7, 0.3))),
        ((("a",), ("1",)), Blend(("a",), (1.0,))),
    ],
)
def test_forms_of_a_blend(value, expected):
    assert parse_blend(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        [],
        "a",
        [[]],
        [["a"], [1, 2]],
        [["a", "b"], [1, -1]],
        [["a", "b"], [0, 2]],
        [["a"], [True]],
        ["a", "b", "a"],
        [["a"], ["x"]],
        [["a"], [float("nan")]],
        [["a"], None, None],
        [["a", "a"], None],
        [1, 2],
        [["a"], "1"],
    ],
)
def test_what_is_no_blend_is_refused(value):
    cfg = get_recipe("tiny_dense")
    cfg.dataset.blend = value
    with pytest.raises(ConfigError, match=r"dataset\.blend = "):
        cfg.finalize()


def webster(weights, count, limits=None):
    """Plain definition: at each moment the data set with the earliest due draw, the first one in a tie."""
    taken, out = [0] * len(weights), []
    for _ in range(count):
        due = [(taken[i] + 0.5) / weight for i, weight in enumerate(weights)]
        due = [float("inf") if limits and limits[i] == taken[i] else time for i, time in enumerate(due)]
        i = due.index(min(due))
        out.append((i, taken[i]))
        taken[i] += 1
    return out


@given(weights_lists, st.integers(0, 150), st.integers(1, 40))
def test_draws_of_any_window_are_the_definitions(weights, first, count):
    sets, draws = draw(np.arange(first, first + count), weights)
    assert list(zip(sets.tolist(), draws.tolist(), strict=True)) == webster(weights, first + count)[first:]


@given(weights_lists, st.data(), st.integers(0, 150), st.integers(1, 40))
def test_a_budget_ends_draws_and_the_others_take_the_place(weights, data, first, count):
    limits = [data.draw(st.none() | st.integers(0, 60)) for _ in weights[1:]] + [None]
    sets, draws = draw(np.arange(first, first + count), weights, limits)
    assert list(zip(sets.tolist(), draws.tolist(), strict=True)) == webster(weights, first + count, limits)[first:]


def test_what_a_run_draws_within_budgets():
    weights, limits, n = [3.0, 1.0, 2.0], [60, None, 500], 3000
    sets, _ = draw(np.arange(n), weights, limits)
    counted = np.bincount(sets, minlength=3)
    assert counted.tolist() == [60, 2440, 500]
    far, _ = draw(np.arange(10**12, 10**12 + 5), weights, limits)
    assert far.tolist() == [1] * 5
    source = BlendedSource([], weights, 1, limits)
    assert source.expected_draws(n) == pytest.approx(counted, abs=1)
    early = np.bincount(draw(np.arange(300), weights, limits)[0], minlength=3)
    assert early.tolist() == pytest.approx([60, 80, 160], abs=1)
    assert source.expected_draws(300) == pytest.approx(early, abs=1)


def write_pair(tmp_path):
    for name, documents in (("web", 50), ("code", 10)):
        write_corpus(tmp_path / name, [50] * documents, vocab_size=100)
    cfg = get_recipe("tiny_dense")
    cfg.dataset.update(blend=[[str(tmp_path / "web"), str(tmp_path / "code")], [1, 1]], mock=False, split="1,0,0")
    cfg.tokenizer.update(tokenizer_type="null", vocab_size=100)
    cfg.model.update(vocab_size=100, seq_length=10)
    return cfg


@pytest.mark.parametrize(("budget", "samples"), [("2 epochs", 98), ("0.5 epochs", 24), (305, 30), ("1K", 100)])
def test_budgets_are_of_tokens_or_epochs(tmp_path, budget, samples):
    cfg = write_pair(tmp_path)
    cfg.dataset.budgets = {"code": budget}
    train, _ = open_sources(cfg.finalize(1), 100)
    assert [corpus.num_samples for corpus in train.corpora] == [249, 49]
    sets, _ = draw(np.arange(2000), train.weights, train.limits)
    assert np.bincount(sets).tolist() == [2000 - samples, samples]
    assert corpus_uses(train, 2000)[1].epochs == pytest.approx(samples / 49)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"cod": "1B"}, r"dataset\.budgets = .*cod: no such file name among the training prefixes \(web, code\)"),
        ({"web": "1B", "code": "1B"}, r"dataset\.budgets = .*one training prefix must have no budget"),
        ({"code": "2 epoch s"}, r"dataset\.budgets\.code = '2 epoch s': must be a number of tokens"),
        ({"code": "-1 epochs"}, r"dataset\.budgets\.code = '-1 epochs': must be a number of tokens"),
        ({"code": 0}, r"dataset\.budgets.* = .*0.*: must be above 0"),
        ({"code": "nan epochs"}, r"dataset\.budgets\.code = 'nan epochs': must be"),
        ({"code": 5}, r"dataset\.budgets\.code = 5: is less than one sample of 10 tokens"),
    ],
)
def test_budgets_that_mean_nothing_are_refused_by_name(tmp_path, budgets, message):
    cfg = write_pair(tmp_path)
    cfg.dataset.budgets = budgets
    with pytest.raises((ConfigError, DataError), match=message):
        open_sources(cfg.finalize(1), 100)


@given(weights_lists)
def test_shares_are_kept_at_every_moment_like_megatrons_rule(weights):
    from megatron.core.datasets.helpers import build_blending_indices

    n = 1000
    sets, _ = draw(np.arange(n), weights)
    shares = np.array(weights) / sum(weights)
    theirs, theirs_draws = np.zeros(n, np.int16), np.zeros(n, np.int64)
    build_blending_indices(theirs, theirs_draws, shares, len(weights), n, False)
    ours_so_far = np.cumsum(sets[:, None] == np.arange(len(weights)), axis=0)
    theirs_so_far = np.cumsum(theirs[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, n + 1)[:, None] * shares
    assert np.abs(ours_so_far - ideal).max() <= max(1, len(weights) / 2)
    assert np.abs(ours_so_far - theirs_so_far).max() <= max(2, len(weights))


def test_weights_equal_to_sizes_end_an_epoch_of_all_together():
    sizes = [7, 1, 13, 4]
    sets, draws = draw(np.arange(sum(sizes)), sizes)
    assert np.bincount(sets).tolist() == sizes
    assert all(sorted(draws[sets == i].tolist()) == list(range(size)) for i, size in enumerate(sizes))


def test_positions_far_out_are_exact_and_cheap():
    weights = [0.5, 0.3, 0.1999, 0.0001]
    start = 40_000_000_000
    sets, draws = draw(np.arange(start, start + 10000), weights)
    again = draw(np.arange(start + 5000, start + 5001), weights)
    assert (sets[5000], draws[5000]) == (again[0][0], again[1][0])
    assert abs(draws[sets == 0][0] - start / 2) < 3
    for i in range(3):
        mine = draws[sets == i]
        assert (np.diff(mine) == 1).all()


def test_mixture_covers_each_epoch_once_in_an_order_of_its_own(tmp_path):
    corpora = []
    for number, length in enumerate((60, 120)):
        write_corpus(tmp_path / f"p{number}", [20] * (length // 20), seed=number)
        reader = IndexedReader(str(tmp_path / f"p{number}"))
        corpora.append(Corpus(reader, (0, len(reader)), "train", 4, 99, 3))
    source = BlendedSource(corpora, None, 3)
    source.build_indices(str(tmp_path / "cache"))
    sizes = [corpus.num_samples for corpus in corpora]
    assert sizes == [14, 29]
    epoch = sum(sizes)
    first, second = (source.sample_ids(np.arange(e * epoch, (e + 1) * epoch)) for e in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(epoch))
    assert first.tolist() != second.tolist()
    assert source.describe(13) == f"{tmp_path}/p0, train sample 13"
    assert source.describe(14) == f"{tmp_path}/p1, train sample 0"
    assert (source.read(15).tokens == corpora[1].read(1).tokens).all()
