"""drafting.fit and drafting.graft on an imported model: what they change, what they keep, and mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.drafting.graft import main as graft
from megatron_mtp.training.state import TrainState
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
    from megatron_mtp.drafting.fit import main

    return main([str(argument) for argument in arguments])


def tensors(path):
    stored = StoredWeights(path)
    return {key: stored.whole(key) for key in sorted(stored.tensors)}


def test_only_the_projections_are_new(base, tmp_path):
    assert fit(base / "run", "--data", base / "text", "--out", tmp_path / "fitted", "--device", "cpu") == 0
    before, after = tensors(base / "run"), tensors(tmp_path / "fitted")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.eh_proj.weight"}
    assert (tmp_path / "fitted/hf/config.json").is_file()


def test_mistakes(base, tmp_path, capsys):
    for source, data, text in (
        (base / "hf", base / "text", "is a Hugging Face folder. Import it first"),
        (base / "run", base / "nothing", "nothing.idx"),
        (base / "nothing", base / "text", "nothing"),
    ):
        assert fit(source, "--data", data, "--out", tmp_path / "out") == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def trained(base, out, change):
    """What a run in bf16 from `base` leaves: `change` gives a tensor of each key."""
    stored = StoredWeights(base / "run")
    cfg = stored.config()
    cfg.model.mtp_use_repeated_layer, cfg.model.mtp_num_layers = False, 2
    with WeightsWriter(out) as writer:
        for key in stored.tensors:
            writer.add(key, stored.shape(key), (0,) * len(stored.shape(key)), change(key, stored.whole(key)).bfloat16())
        writer.complete(cfg.finalize(), TrainState().to_dict(), reason="end")


def test_a_graft_has_the_trunk_bit_for_bit_and_the_drafter_as_trained(base, tmp_path):
    trained(base, tmp_path / "trained", lambda key, value: value + 1 if key.startswith("mtp.") else value)
    assert graft([str(base / "run"), "--drafter", str(tmp_path / "trained"), "--out", str(tmp_path / "out")]) == 0
    before, after = tensors(base / "run"), tensors(tmp_path / "out")
    for key, value in after.items():
        assert torch.equal(value, (before[key] + 1).bfloat16().float() if key.startswith("mtp.") else before[key])


def test_a_graft_on_another_trunk_is_refused(base, tmp_path, capsys):
    trained(base, tmp_path / "trained", lambda key, value: value + 0.1 if "final_layernorm" in key else value)
    assert graft([str(base / "run"), "--drafter", str(tmp_path / "trained"), "--out", str(tmp_path / "out")]) == 2
    assert "decoder.final_layernorm.weight and 0 more differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
