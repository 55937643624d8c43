"""fit_drafter on an imported model: the projection is new, all else is what it was; mistakes are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mtp.checkpoint.streaming import StoredWeights
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.data.indexed import IndexedWriter
from tests.convert.hf_models import make

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make("qwen3", folder / "hf")
    import_hf(folder / "hf", folder / "run", mtp_depths=2, mtp_init="last_layer")
    vocab_size = StoredWeights(folder / "run").config().model.vocab_size
    writer = IndexedWriter(str(folder / "text"), np.dtype(np.int32))
    for _ in range(25):
        ids = np.random.default_rng(0).integers(0, vocab_size, 20)
        writer.write(ids, np.array([len(ids)]))
    writer.close()
    return folder


def fit(*arguments):
    from megatron_mtp.tools.fit_drafter import main

    return main([str(argument) for argument in arguments])


def tensors(path):
    stored = StoredWeights(path)
    return {key: stored.read(key, (0,) * len(stored.shape(key)), stored.shape(key)) for key in sorted(stored.tensors)}


def test_only_the_projections_are_new(base, tmp_path):
    assert fit(base / "run", "--data", base / "text", "--out", tmp_path / "fitted", "--device", "cpu") == 0
    before, after = tensors(base / "run"), tensors(tmp_path / "fitted")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.eh_proj.weight"}
    assert (tmp_path / "fitted/hf/config.json").is_file()


def test_mistakes(base, tmp_path, capsys):
    for source, data, text in (
        (base / "hf", base / "text", "is in Hugging Face form. Import it first"),
        (base / "run", base / "nothing", "nothing.idx"),
        (base / "nothing", base / "text", "nothing"),
    ):
        assert fit(source, "--data", data, "--out", tmp_path / "out") == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
