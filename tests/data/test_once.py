"""validation.eval_iters = -1: each sample of each set once, at every data-parallel and micro-batch size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.batch import NO_SAMPLE
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.uses import repeats
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import get_recipe
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit
SEQ = 16


@pytest.fixture
def cfg(tmp_path) -> ConfigContainer:
    """Two corpora of 37 and 18 samples, in a mixture with other weights."""
    for name, count in (("a", 20), ("b", 10)):
        write_corpus(tmp_path / name, [30] * count, seed=ord(name))
    cfg = ConfigContainer()
    cfg.model.vocab_size, cfg.model.seq_length = 100, SEQ
    cfg.model.virtual_pipeline_model_parallel_size = 1
    cfg.train.update(micro_batch_size=1, global_batch_size=8)
    cfg.validation.update(eval_iters=-1)
    cfg.dataset.update(blend_per_split=[[str(tmp_path / "a")], None, None])
    cfg.dataset.valid_sets = {"both": [[str(tmp_path / "a"), str(tmp_path / "b")], [0.1, 0.9]]}
    return cfg


def drawn(cfg: ConfigContainer, dp_size: int) -> tuple[Counter, np.ndarray, list[int]]:
    """Sample ids of all ranks, the targets that they count, and the sizes of the batches."""
    ids, targets, sizes = Counter(), np.zeros(3, np.int64), []
    for rank in range(dp_size):
        data = build_data(cfg, DataPlacement(rank, dp_size), num_depths=2)
        assert data.valid_names == ("both",)
        batches = list(data.valid("both"))
        ids.update(int(i) for batch in batches for row in batch.places for i in batch.sample_ids[row])
        targets += sum(batch.num_targets.numpy() for batch in batches)
        sizes = [len(batch.sample_ids) for batch in batches]
    return ids, targets, sizes


@pytest.mark.parametrize(("dp_size", "micro", "size"), [(1, 1, 1), (1, 4, 8), (2, 1, 8), (2, 3, 6), (4, 2, 64)])
def test_each_sample_is_read_once_and_fillers_count_nothing(cfg, dp_size, micro, size):
    cfg.validation.update(eval_micro_batch_size=micro, eval_global_batch_size=size)
    ids, targets, sizes = drawn(cfg, dp_size)
    filled = ids.pop(NO_SAMPLE, 0)
    assert ids == Counter(range(37 + 18))
    assert targets.tolist() == [55 * SEQ, 55 * (SEQ - 1), 55 * (SEQ - 2)]
    assert filled == sum(sizes) - 55 < dp_size * micro, "no more than what makes full micro-batches"


def test_the_interleaved_schedule_gets_a_multiple_of_its_stages(cfg):
    cfg.model.update(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    cfg.validation.update(eval_micro_batch_size=1, eval_global_batch_size=8)
    assert drawn(cfg, 1)[2] == [8, 8, 8, 8, 8, 8, 8]
    cfg.validation.eval_global_batch_size = 18
    assert drawn(cfg, 1)[2] == [18, 18, 18, 2]


def test_what_cannot_be_read_once_is_refused():
    cfg = get_recipe("tiny_moe")
    cfg.validation.eval_iters = -1
    with pytest.raises(ConfigError, match="mock data has no end"):
        cfg.finalize()
    cfg.dataset.update(split="1,0,0", valid_sets={"a": ["a"]})
    cfg.copy().finalize()
    cfg.model.update(moe_expert_capacity_factor=1.0)
    with pytest.raises(ConfigError, match="would push tokens of the set out of experts"):
        cfg.finalize()


def test_how_often_an_evaluation_reads_its_set(cfg):
    data = build_data(cfg, DataPlacement(), 2)
    assert repeats("both", data.uses(None)["both"]) is None
    cfg.validation.eval_iters = 7
    uses = build_data(cfg, DataPlacement(), 2).uses(370)
    prefix = uses["both"][1].prefix
    assert repeats("both", uses["both"]) == (
        f"validation set both: 55 samples, one evaluation reads {prefix} 2.8 times"  # 7 * 8 * 0.9 / 18
    )
    assert uses["train"][0].epochs == 10.0
    cfg.dataset.valid_sets = {"one": [prefix]}
    uses = build_data(cfg, DataPlacement(), 2).uses(None)
    assert repeats("one", uses["one"]) == "validation set one: 18 samples, one evaluation reads it 3.1 times"
    cfg.validation.eval_iters = 2
    assert repeats("one", build_data(cfg, DataPlacement(), 2).uses(None)["one"]) is None
