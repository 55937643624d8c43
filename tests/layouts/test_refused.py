"""Layouts that cannot be are refused by name, before a process is started."""

from __future__ import annotations

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.verify.placements import Placement
from tests.layouts.models import MODELS

pytestmark = pytest.mark.unit

REFUSED = [
    ("moe", "tp=2", "model.sequence_parallel"),
    ("mla_moe", "tp=2,pp=2", "model.sequence_parallel"),
    ("dense", "ep=2", "model.expert_model_parallel_size"),
    ("moe", "ep=3", "model.num_moe_experts"),
    ("dense", "tp=3", "model.num_attention_heads"),
    ("dense", "vp=2", "model.virtual_pipeline_model_parallel_size"),
    ("dense", "pp=8", "model.num_layers"),
    ("dense", "cp=3", "model.seq_length"),
    ("dense", "pp=2,vp=2,mbs=8", "train.global_batch_size"),
    ("dense", "dp=3", "train.global_batch_size"),
    ("dense", "pp=2,layout=Etttt|mm", "L must stand last"),
    ("dense", "pp=2,layout=Ettttmm|L", "MTP layers (m) cannot be on the first pipeline rank"),
    ("dense", "pp=4,layout=Ett|tt|m|mL", "must be in one chunk"),
    ("moe", "dp=1,ep=2", "world_size = 1"),
]


@pytest.mark.parametrize(("model", "layout", "names"), REFUSED)
def test_is_refused(model, layout, names):
    with pytest.raises(ConfigError) as caught:
        Placement.parse(layout).apply(MODELS[model]())
    assert names in str(caught.value)
    assert str(caught.value).startswith(f"--layouts, {layout}: ")
