"""Every family with a class in transformers: the same bits there and back, and the same logits at every layout."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from tests.convert.hf_models import MODELS, logits_of, make, tokens
from tests.convert.ours import logits

pytestmark = pytest.mark.dist

LOGITS = 1e-5
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
DENSE = {"llama", "llama3_rope", "qwen3", "mimo"}
FAST = {"llama", "qwen3_moe", "deepseek_v3"}
ALL_LAYOUTS = {"llama", "deepseek_v3"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (folder, ids, logits of transformers), made once."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "hf"
            model, ids = make(name, folder), tokens()
            known[name] = (folder, ids, logits_of(model, ids))
        return known[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_are_the_same_bits(name, made, tmp_path):
    folder, _, _ = made(name)
    import_hf(folder, tmp_path / "checkpoint")
    report = export_hf(tmp_path / "checkpoint", tmp_path / "back", family="mimo" if name == "mimo" else None)
    first, back = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert first.keys() == back.keys() == set(report.written)
    for tensor in first:
        assert first[tensor].dtype == back[tensor].dtype
        assert torch.equal(first[tensor], back[tensor]), tensor


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS])
def test_one_rank_computes_what_transformers_computes(name, made, ranks, tmp_path):
    folder, ids, expected = made(name)
    import_hf(folder, tmp_path / "checkpoint")
    for source in (folder, tmp_path / "checkpoint"):
        (got,) = ranks(1).run(logits, str(source), ids, {})
        assert (got[0] - expected).abs().max() < LOGITS


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, id=f"{name}-{kind}", marks=() if name in ALL_LAYOUTS else pytest.mark.slow)
        for name in MODELS
        for kind, layout in (("tp", TP2), ("pp", PP2), ("ep", EP2))
        if kind != "ep" or name not in DENSE
    ],
)
def test_two_ranks_compute_what_transformers_computes(name, layout, made, ranks, tmp_path):
    folder, ids, expected = made(name)
    import_hf(folder, tmp_path / "checkpoint")
    for source in (folder, tmp_path / "checkpoint"):
        for got in ranks(2).run(logits, str(source), ids, layout):
            assert got is None or (got[0] - expected).abs().max() < LOGITS
