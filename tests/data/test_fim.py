"""Fill-in-the-middle against a plain reference, for every slice, form, cut and mask; and its mistakes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.data.batch import BatchRules, make_micro_batch
from megatron_mtp.data.corpus import Corpus
from megatron_mtp.data.fim import FillInTheMiddle, TokenCutter, find_sentinels
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import open_tokenizer
from megatron_mtp.errors import ConfigError, DataError
from megatron_mtp.recipes import get_recipe
from tests.data.corpora import hash_samples, write_corpus

pytestmark = pytest.mark.unit

EOD, P, S, M = 99, 100, 101, 102


def rule(rate=1.0, spm_rate=0.0, cutter=None, **changes):
    return FillInTheMiddle(
        rate=rate, spm_rate=spm_rate, sentinels=(P, S, M), eod=EOD, seed=1, name="a:train", cutter=cutter, **changes
    )


def reader_of(documents):
    def read(document, offset, length):
        return np.array(documents[document][offset : offset + length])

    return read


def whole(fim, documents, number, **masks):
    length, read = len(documents[number]), reader_of(documents)
    size = sum(part.length for part in fim.parts(number, length, read))
    return fim.read(number, length, 0, size, read, masks.get("read_targets"))


def parts_of(tokens):
    """Form, parts and end of a rearranged document. PSM with an empty prefix is SPM with one, token for token."""
    tokens = list(tokens)
    end = [tokens.pop()] if tokens[-1] == EOD else []
    assert tokens[0] == P
    assert [tokens.count(sentinel) for sentinel in (P, S, M)] == [1, 1, 1]
    s, m = tokens.index(S), tokens.index(M)
    if s == 1:
        return "spm", tokens[2:m], tokens[m + 1 :], end
    return "psm", (tokens[1:s], tokens[s + 1 : m], tokens[m + 1 :]), None, end


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    has_eod=st.booleans(),
)
def test_a_document_keeps_its_tokens_and_its_end(lengths, spm_rate, has_eod):
    rng = np.random.default_rng(sum(lengths))
    documents = [[*rng.integers(0, 99, n - 1).tolist(), EOD if has_eod else 5] for n in lengths]
    fim = rule(spm_rate=spm_rate)
    for number, document in enumerate(documents):
        tokens, is_target = whole(fim, documents, number)
        form, first, second, end = parts_of(tokens)
        assert len(tokens) == len(document) + 3
        assert is_target.all()
        if form == "spm":
            assert spm_rate > 0 or tokens[1] == S
            assert second + first + end == document
        else:
            assert spm_rate < 1
            prefix, suffix, middle = first
            assert prefix + middle + suffix + end == document
        assert end == ([EOD] if has_eod else [])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=20),
    rate=st.sampled_from([0.3, 1.0]),
    seq_length=st.integers(2, 12),
)
def test_samples_are_the_rearranged_documents_end_to_end(tmp_path_factory, lengths, rate, seq_length):
    """Every slice of every sample, with document starts and a stored loss mask."""
    prefix = tmp_path_factory.mktemp("corpus") / "a"
    documents = write_corpus(prefix, lengths)
    masks = [[(7 * i + j) % 3 > 0 for j in range(len(d))] for i, d in enumerate(documents)]
    writer = IndexedWriter(f"{prefix}_mask", np.dtype(np.uint8))
    for mask in masks:
        writer.write(np.array(mask, np.uint8), np.array([len(mask)]))
    writer.close()
    fim, reader = rule(rate, 0.5, has_sentinel_loss=False), IndexedReader(str(prefix))
    if sum(lengths) + 3 * len(lengths) <= 2 * seq_length:
        return
    try:
        corpus = Corpus(reader, (0, len(reader)), "train", seq_length, EOD, 1, IndexedReader(f"{prefix}_mask"), fim)
    except DataError:
        return  # too small
    corpus.build_index(None)
    tokens, starts, targets = [], [], []
    for i in corpus._index[0, slice(0, len(documents))].tolist():
        if fim.chosen(np.array([i]), np.array([len(documents[i])]))[0]:
            one, mask = whole(fim, documents, i, read_targets=reader_of(masks))
            plain, _ = whole(rule(rate, 0.5), documents, i)
            assert one.tolist() == plain.tolist()
            assert not mask[one >= P].any()
            moved = sorted(zip(one[one < P].tolist(), mask[one < P].tolist(), strict=True))
            assert moved == sorted(zip(documents[i], masks[i], strict=True))
        else:
            one, mask = np.array(documents[i]), np.array(masks[i])
        tokens += one.tolist()
        targets += mask.tolist()
        starts += [True] + [False] * (len(one) - 1)
    assert corpus.num_tokens == len(tokens)
    assert corpus.num_samples == (len(tokens) - 1) // seq_length
    for n in range(corpus.num_samples):
        sample, span = corpus.read(n), slice(n * seq_length, (n + 1) * seq_length + 1)
        assert sample.tokens.tolist() == tokens[span]
        assert sample.starts.tolist() == starts[span]
        assert sample.is_target.tolist() == targets[span]


def test_the_share_and_the_forms_are_those_asked_for():
    documents, lengths = np.arange(20_000), np.full(20_000, 10)
    chosen = rule(0.1).chosen(documents, lengths)
    assert abs(chosen.mean() - 0.1) < 0.01
    stored = [[5] * 300] * 2000  # so long that few prefixes are empty
    forms = [parts_of(whole(rule(spm_rate=0.25), stored, n)[0])[0] for n in range(2000)]
    assert abs(forms.count("spm") / 2000 - 0.25) < 0.04
    assert not rule(1.0).chosen(np.arange(5), np.ones(5)).any(), "a document of one token has nothing to fill in"


def test_cuts_are_uniform_and_may_be_at_either_end():
    stored = [[*range(4), EOD]] * 5000
    middles = []
    for number in range(5000):
        tokens = whole(rule(), stored, number)[0].tolist()
        middles.append(len(tokens) - tokens.index(M) - 2)
    counts = np.bincount(middles, minlength=5) / 5000
    # Two places of five, both uniform: the distance is 0 with 5 / 25 and d with 2 (5 - d) / 25.
    assert np.abs(counts - np.array([5, 8, 6, 4, 2]) / 25).max() < 0.03


@dataclass
class Words:
    """A tokenizer of a few words and all letters: id 10 + i is a letter, 0.. are words."""

    words: tuple[str, ...] = ("hello", "world", "fill")
    kind = "words"

    def decode(self, ids):
        return "".join(self.words[i] if i < 10 else chr(i - 10 + ord("a")) for i in ids)

    def encode_batch(self, texts):
        return [[self.words.index(t)] if t in self.words else [ord(c) - ord("a") + 10 for c in t] for t in texts]

    def fingerprint(self):
        return "words"


def test_cuts_between_characters_keep_the_text(tmp_path):
    tokenizer = Words()
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(0, 3, rng.integers(1, 6)).tolist(), EOD] for _ in range(300)]
    fim, inside = rule(spm_rate=0.5, cutter=TokenCutter(tokenizer)), 0
    for number, document in enumerate(documents):
        form, first, second, end = parts_of(whole(fim, documents, number)[0])
        ids = second + first if form == "spm" else first[0] + first[2] + first[1]
        assert tokenizer.decode(ids) == tokenizer.decode(document[:-1])
        assert end == [EOD]
        inside += any(i >= 10 for i in ids)
    assert inside > 200, "most cuts lie inside a word"
    writer = IndexedWriter(str(tmp_path / "a"), np.dtype(np.uint16))
    for document in documents:
        writer.write(np.array(document), np.array([len(document)]))
    writer.close()
    reader = IndexedReader(str(tmp_path / "a"))
    corpus = Corpus(reader, (0, len(reader)), "train", 7, EOD, 1, None, fim)
    corpus.build_index(None)
    stream = [
        token
        for i in corpus._index[0, slice(0, len(documents))].tolist()
        for token in whole(fim, documents, i)[0].tolist()
    ]
    assert len(stream) > corpus.num_tokens, "pieces are more than the tokens that were cut"
    for n in range(corpus.num_samples):
        assert corpus.read(n).tokens.tolist() == stream[n * 7 : n * 7 + 8]


def test_targets_of_every_depth_are_those_of_the_rearranged_sequence(tmp_path):
    """Also with documents apart: sentinels do not end a document, and nothing crosses an end of one."""
    write_corpus(tmp_path / "a", [12, 9, 14, 11])
    reader = IndexedReader(str(tmp_path / "a"))
    corpus = Corpus(reader, (0, 4), "train", 20, EOD, 1, None, rule(has_sentinel_loss=False))
    corpus.build_index(None)
    sample = corpus.read(0)
    batch = make_micro_batch([sample], BatchRules(num_depths=2, separate_documents=True, reset_position_ids=True))
    t, segment = sample.tokens, np.cumsum(sample.starts)
    for k in range(3):
        for i in range(20 - k):
            target = int(t[i + k + 1])
            assert int(batch.labels[k, 0, i]) == target
            counts = target < P and segment[i] == segment[i + k + 1]
            assert bool(batch.loss_mask[k, 0, i]) == counts


def test_the_transformation_is_a_function_of_seed_name_and_document():
    stored = [[*range(20), EOD]] * 50

    def all_of(**changes):
        fim = FillInTheMiddle(
            **{"rate": 0.5, "spm_rate": 0.5, "sentinels": (P, S, M), "eod": EOD, "seed": 1, "name": "a"} | changes
        )
        return [whole(fim, stored, n)[0].tolist() for n in range(50)]

    assert all_of() == all_of()
    assert all_of() != all_of(seed=2)
    assert all_of() != all_of(name="b")


def test_batches_are_those_of_any_layout_and_of_a_resume(tmp_path):
    cfg = config(tmp_path, dataset__fim_tokens=["100", "101", "102"], dataset__prefetch_steps=0)
    cfg.train.update(global_batch_size=8, micro_batch_size=2)
    cfg = cfg.finalize(1)

    def batches(dp_size, micro, first):
        found = []
        for rank in range(dp_size):
            data = build_data(cfg, DataPlacement(dp_rank=rank, dp_size=dp_size), num_depths=2)
            stream = data.builder(data._train, micro)
            found.append([hash_samples(stream.build(n, np.arange(8 * n, 8 * n + 8))) for n in range(first, 4)])
        return [{k: v for one in step for k, v in one.items()} for step in zip(*found, strict=True)]

    whole_run = batches(1, 2, 0)
    assert batches(2, 2, 0) == batches(4, 1, 0) == whole_run
    assert batches(2, 1, 2) == whole_run[2:]
    plain = config(tmp_path, dataset__fim_rate=0.0).finalize(1)
    sample = build_data(plain, DataPlacement(), num_depths=2).look(0)[0]
    assert not (sample.tokens >= P).any()


def test_two_documents_in_one_sequence_are_refused(tmp_path):
    writer = IndexedWriter(str(tmp_path / "a"), np.dtype(np.uint16))
    writer.write(np.array([1, 2, EOD, 3, 4, 5, EOD]), np.array([7]))
    writer.close()
    reader = IndexedReader(str(tmp_path / "a"))
    corpus = Corpus(reader, (0, 1), "train", 8, EOD, 1, None, rule())
    corpus.build_index(None)
    with pytest.raises(DataError, match=r"end-of-document token before its end.*fim_rate"):
        corpus.read(0)


def config(tmp_path, **changes):
    write_corpus(tmp_path / "code", [50] * 20, vocab_size=99, eod=103)
    cfg = get_recipe("tiny_dense")
    cfg.dataset.update(blend=[str(tmp_path / "code")], mock=False, fim_rate=0.5, split="1,0,0")
    cfg.tokenizer.update(tokenizer_type="null", vocab_size=104)
    cfg.model.update(vocab_size=104, seq_length=16)
    for path, value in changes.items():
        section, name = path.split("__")
        setattr(getattr(cfg, section), name, value)
    return cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"dataset\.fim_rate = 0\.5: the tokenizer \(null\) knows none of the usual sentinels"),
        ({"dataset__fim_tokens": ["100", "101", "500"]}, r"dataset\.fim_tokens = .* \(null\) has no token 500"),
        ({"dataset__fim_tokens": ["100", "101", "103"]}, r"dataset\.fim_tokens = .* one of them ends documents"),
        ({"dataset__fim_tokens": ["100", "101"]}, r"dataset\.fim_tokens = .* three different tokens"),
        ({"dataset__fim_tokens": ["100", "101", "101"]}, r"dataset\.fim_tokens = .* three different tokens"),
        ({"dataset__fim_rate": 1.5}, r"dataset\.fim_rate = 1\.5: must be at least 0 and at most 1"),
        ({"dataset__fim_spm_rate": -0.5}, r"dataset\.fim_spm_rate = -0\.5: must be at least 0"),
        ({"dataset__fim_prefixes": ["cod"]}, r"dataset\.fim_prefixes = .* cod: no such file name .*code"),
        ({"dataset__blend": None, "dataset__mock": True}, r"dataset\.fim_rate = 0\.5: mock data has no documents"),
    ],
)
def test_mistakes_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_data(config(tmp_path, **changes).finalize(1))


def test_sentinels_are_found_by_name(tmp_path):
    from tokenizers import Tokenizer, models

    names = ["<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "a", "b"]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer("huggingface", str(tmp_path / "tokenizer.json"))
    data = get_recipe("tiny_dense").dataset
    assert find_sentinels(data, tokenizer) == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"takes its sentinels from a tokenizer, and the run has none"):
        find_sentinels(data, None)
    data.fim_tokens = ["b", "a", "<|fim_end|>"]
    assert find_sentinels(data, tokenizer) == (5, 4, 3)
