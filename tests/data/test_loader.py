import itertools

import numpy as np
import pytest
import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.errors import ConfigError, DataError
from tests.data.corpora import hash_samples, write_corpus

pytestmark = pytest.mark.unit


def config(**dataset):
    cfg = ConfigContainer()
    cfg.model.vocab_size, cfg.model.seq_length = 300, 32
    cfg.train.micro_batch_size, cfg.train.global_batch_size = 1, 8
    cfg.validation.eval_iters = 3
    cfg.dataset.mock = True
    for name, value in dataset.items():
        setattr(cfg.dataset, name, value)
    return cfg


def stream_hashes(cfg, dp_size, consumed, steps):
    """For each step the ordered list of (sample id, hash), merged over data-parallel ranks."""
    merged = [{} for _ in range(steps)]
    for rank in range(dp_size):
        data = build_data(cfg, DataPlacement(rank, dp_size), num_depths=2)
        for step, batch in enumerate(itertools.islice(data.train(consumed), steps)):
            hashes = hash_samples(batch)
            assert not hashes.keys() & merged[step].keys()
            merged[step].update(hashes)
        data.close()
    for batch in merged:
        assert sorted(batch) == list(range(len(batch)))
    return [[batch[place] for place in sorted(batch)] for batch in merged]


@pytest.fixture(params=["mock", "files"])
def ramped(request, tmp_path):
    cfg = config()
    cfg.train.global_batch_size, cfg.train.rampup_batch_size = 16, [8, 8, 120]
    if request.param == "files":  # about 240 samples, so that 50 steps take more than two epochs
        cfg.dataset.mock, cfg.dataset.split = False, "9,1,0"
        for name in "ab":
            write_corpus(tmp_path / name, [10, 90, 33] * 30, seed=ord(name))
        cfg.dataset.blend = [[str(tmp_path / name) for name in "ab"], [0.3, 0.7]]
    return cfg


def test_order_is_the_same_for_every_dp_and_micro_batch_and_after_a_resume(ramped):
    reference = stream_hashes(ramped, 1, 0, 50)
    assert {len(batch) for batch in reference} == {8, 16}
    for dp_size, micro_batch_size in [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]:
        ramped.train.micro_batch_size = micro_batch_size
        assert stream_hashes(ramped, dp_size, 0, 50) == reference
    for steps in (5, 15, 16, 40):
        consumed = sum(len(batch) for batch in reference[:steps])
        assert stream_hashes(ramped, 2, consumed, 50 - steps) == reference[steps:]


def test_seed_changes_the_order():
    cfg = config()
    first = stream_hashes(cfg, 1, 0, 2)
    cfg.rng.seed += 1
    assert stream_hashes(cfg, 1, 0, 2) != first


def test_shapes_and_dtypes():
    cfg = config(reset_attention_mask=True)
    cfg.train.micro_batch_size = 2
    data = build_data(cfg, DataPlacement(1, 2, 1, 2), num_depths=3)
    batch = next(data.train())
    assert len(batch.micro_batches) == 2
    micro = batch.micro_batches[0]
    assert (micro.tokens.shape, micro.tokens.dtype) == ((2, 16), torch.int64)
    assert (micro.position_ids.shape, micro.position_ids.dtype) == ((2, 16), torch.int64)
    assert (micro.shifted_ids.shape, micro.shifted_ids.dtype) == ((3, 2, 16), torch.int64)
    assert (micro.labels.shape, micro.labels.dtype) == ((4, 2, 16), torch.int64)
    assert (micro.loss_mask.shape, micro.loss_mask.dtype) == ((4, 2, 16), torch.float32)
    assert (micro.segment_ids.shape, micro.segment_ids.dtype) == ((2, 32), torch.int32)
    assert (batch.num_targets.shape, batch.num_targets.dtype) == ((4,), torch.int64)
    data.close()


def test_cp_ranks_hold_slices_of_the_whole_batch_and_counts_add_up():
    cfg = config(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    complete = next(build_data(cfg, DataPlacement(), 2).train())
    parts = [next(build_data(cfg, DataPlacement(cp_rank=r, cp_size=2), 2).train()) for r in range(2)]
    assert torch.equal(sum(part.num_targets for part in parts), complete.num_targets)
    for m, full in enumerate(complete.micro_batches):
        for name in ("tokens", "position_ids", "shifted_ids", "labels", "loss_mask"):
            value = getattr(full, name)
            chunks = value.chunk(4, dim=-1)
            for r, part in enumerate(parts):
                expected = torch.cat([chunks[r], chunks[3 - r]], -1)
                assert torch.equal(getattr(part.micro_batches[m], name), expected), name
        assert all(torch.equal(part.micro_batches[m].segment_ids, full.segment_ids) for part in parts)


def test_documents_stay_apart_only_on_request():
    plain = next(build_data(config(), DataPlacement(), 2).train())
    assert plain.num_targets.tolist() == [8 * 32, 8 * 31, 8 * 30]
    assert plain.micro_batches[0].segment_ids is None
    masked = next(build_data(config(eod_mask_loss=True), DataPlacement(), 2).train())
    apart = next(build_data(config(reset_attention_mask=True), DataPlacement(), 2).train())
    assert (masked.num_targets < plain.num_targets).all()
    assert masked.num_targets[0] == apart.num_targets[0]  # the target after EOD is the next document's first token
    assert (masked.num_targets[1:] > apart.num_targets[1:]).all()
    for micro in masked.micro_batches:
        assert ((micro.tokens == 299) == (micro.loss_mask[0] == 0)).all()


def test_validation_is_the_same_at_each_call_and_not_the_training_data():
    data = build_data(config(), DataPlacement(), 1)
    assert data.valid_names == ("valid",)
    first = [hash_samples(batch) for batch in data.valid()]
    assert len(first) == 3
    assert [hash_samples(batch) for batch in data.valid("valid")] == first
    train = {digest for batch in itertools.islice(data.train(), 50) for _, digest in hash_samples(batch).values()}
    assert not train & {digest for batch in first for _, digest in batch.values()}
    data.close()


def test_no_validation_where_none_is_wanted():
    cfg = config()
    cfg.validation.eval_iters = 0
    assert build_data(cfg, DataPlacement(), 1).valid_names == ()


def test_batch_that_does_not_divide_is_refused():
    cfg = config()
    cfg.train.micro_batch_size = 3
    with pytest.raises(ConfigError, match=r"global_batch_size = 8: .* ranks = 6"):
        cfg.finalize(2)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_ids_outside_the_vocabulary_are_named(prefetch_steps):
    cfg = config(prefetch_steps=prefetch_steps)
    data = build_data(cfg, DataPlacement(), 0)
    object.__setattr__(data, "_vocab_size", 100)  # a model smaller than the data
    with pytest.raises(DataError, match=r"mock data 'train', sample \d+: holds token id \d+, outside .* 100 ids"):
        list(itertools.islice(data.train(), 4))
    data.close()


def test_mock_data_can_be_learnt_and_gets_harder_with_distance():
    """The most frequent successor at distance d predicts held-out tokens, less well the farther it is."""
    cfg = config()
    cfg.model.seq_length, cfg.model.vocab_size = 256, 64
    data = build_data(cfg, DataPlacement(), 0)
    train = np.concatenate([m.tokens[0].numpy() for b in itertools.islice(data.train(), 20) for m in b.micro_batches])
    held = np.concatenate([m.tokens[0].numpy() for b in data.valid() for m in b.micro_batches])
    hits = []
    for distance in (1, 2, 3):
        counts = np.zeros((64, 64), int)
        np.add.at(counts, (train[:-distance], train[distance:]), 1)
        hits.append((counts.argmax(1)[held[:-distance]] == held[distance:]).mean())
    assert hits[0] > 0.8
    assert hits[0] > hits[1] > hits[2] > 0.5
    data.close()
