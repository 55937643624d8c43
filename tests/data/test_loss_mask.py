"""A loss mask next to the tokens: a masked token is a target of no depth, whichever slot predicts it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.sources import check_data
from megatron_mtp.errors import ConfigError, DataError
from megatron_mtp.recipes import get_recipe
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.unit

LENGTHS = [40, 17, 90, 33, 61] * 4


def config(prefix, suffix: str):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, ["model.seq_length=16", "dataset.split=1,0,0", f"dataset.loss_mask_suffix={suffix}"])
    cfg.dataset.blend, cfg.validation.eval_iters = [str(prefix)], 0
    return cfg.finalize()


def write_mask(prefix, values) -> None:
    """values: one array for each document."""
    writer = IndexedWriter(str(prefix), np.uint8)
    for document in values:
        writer.write(document, np.array([len(document)]))
    writer.close()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_masked_tokens_are_targets_of_no_depth(tmp_path, cp_size):
    documents = write_corpus(tmp_path / "chat", LENGTHS)
    # A token is a target if its id is even: so the batches themselves say what their masks must be.
    write_mask(tmp_path / "chat_mask", [np.array([token % 2 == 0 for token in document]) for document in documents])
    cfg = config(tmp_path / "chat", "_mask")
    for cp_rank in range(cp_size):
        data = build_data(cfg, DataPlacement(0, 1, cp_rank, cp_size), 2)
        batches = data.train(0)
        for micro_batch in next(batches).micro_batches:
            even = (micro_batch.labels % 2 == 0).float()
            # Beyond the sample no target exists: labels are 0 there, which is even, and the mask is 0.
            assert ((micro_batch.loss_mask == 0) | (even == 1)).all()
            assert (micro_batch.loss_mask[0] == even[0]).all()
            assert micro_batch.loss_mask[1:].any()
        batches.close()
        data.close()


def test_a_mask_of_other_lengths_is_named(tmp_path):
    write_corpus(tmp_path / "chat", LENGTHS)
    write_mask(tmp_path / "chat_mask", [np.ones(length + 1, np.uint8) for length in LENGTHS])
    with pytest.raises(DataError, match=r"_mask: its 20 sequences have other lengths .*dataset\.loss_mask_suffix"):
        check_data(config(tmp_path / "chat", "_mask"))


def test_a_missing_mask_is_named(tmp_path):
    write_corpus(tmp_path / "chat", LENGTHS)
    with pytest.raises(DataError, match=r"chat_mask\.idx: cannot be read"):
        check_data(config(tmp_path / "chat", "_mask"))


def test_mock_data_has_no_mask():
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, ["dataset.mock=true", "dataset.loss_mask_suffix=_mask"])
    with pytest.raises(ConfigError, match="mock data has no files"):
        cfg.finalize()
