"""Defects that are refused before launch: the message names the field, the rule and what to do."""

from __future__ import annotations

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.errors import ConfigError, UnsupportedError
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit

PP2 = "model.pipeline_model_parallel_size=2"
REFUSED = [
    (
        ["model.mtp_hidden_source=pre_final_norm", PP2, "model.pipeline_model_parallel_layout=Etttt|mmL"],
        "in model.pipeline_model_parallel_layout = Etttt|mmL the MTP layers (m) share no chunk with a decoder layer",
    ),
    (
        ["model.backend=transformer_engine", "dataset.reset_attention_mask=true"],
        "Use model.backend = 'torch' (or 'auto', which then chooses it)",
    ),
    (
        [
            "model.backend=transformer_engine",
            "model.mcore.softmax_type=learnable",
            "model.tensor_model_parallel_size=2",
        ],
        "the gradient norm would leave out the attention sinks",
    ),
    (
        [
            "model.backend=transformer_engine",
            "model.mcore.fp8=e4m3",
            "model.recompute_granularity=full",
            "model.recompute_method=block",
            "model.recompute_num_layers=1",
        ],
        "are recomputed by 'uniform' with 1 layer only",
    ),
]
ALLOWED = [
    ["model.mtp_hidden_source=pre_final_norm", PP2],
    ["model.mtp_hidden_source=pre_final_norm", PP2, "model.pipeline_model_parallel_layout=Ettt|tmmL"],
    [
        "model.mtp_hidden_source=pre_final_norm",
        PP2,
        "model.pipeline_model_parallel_layout=Etttt|L",
        "model.mtp_num_layers=0",
    ],
    ["model.backend=auto", "dataset.reset_attention_mask=true", "model.context_parallel_size=2"],
    ["model.backend=transformer_engine", "model.mcore.softmax_type=learnable"],
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[case[0][0] for case in REFUSED])
def test_refused_by_name(overrides, words):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, overrides)
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert isinstance(caught.value, UnsupportedError)
    assert words in str(caught.value)


@pytest.mark.parametrize("overrides", ALLOWED, ids=[" ".join(case) for case in ALLOWED])
def test_neighbours_are_allowed(overrides):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, overrides)
    given = {override: value_at(cfg, override) for override in overrides}
    cfg.finalize()
    assert given == {override: value_at(cfg, override) for override in overrides}


def value_at(cfg: ConfigContainer, override: str) -> object:
    section, field = override.partition("=")[0].split(".")[:2]
    return getattr(getattr(cfg, section), field)


def test_auto_takes_torch_where_attention_stops_at_documents(monkeypatch):
    from megatron_mtp.model import build

    monkeypatch.setattr(build, "te_is_available", lambda: True)
    cfg = get_recipe("tiny_dense")
    assert build.wants_te(cfg, "cuda")
    cfg.dataset.reset_attention_mask = True
    assert not build.wants_te(cfg, "cuda")


def test_whole_weights_are_not_marked_as_sharded():
    from torch import nn

    from megatron_mtp.model.torch_backend.mla import mark_whole_weight

    whole, shard = nn.Linear(4, 6), nn.Linear(4, 3)
    for linear in (whole, shard):
        linear.weight.tensor_model_parallel = True
        mark_whole_weight(linear, 6)
    assert not whole.weight.tensor_model_parallel
    assert shard.weight.tensor_model_parallel
