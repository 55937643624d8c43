"""The drafter's recipe: what it freezes, and how its steps weigh."""

from __future__ import annotations

import pytest

from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.recipes import get_recipe
from megatron_mtp.recipes.mtp_finetune import finetune_drafter

pytestmark = pytest.mark.unit


def test_weights_of_fastmtp():
    """0.51, 0.31 and 0.18, which sum to 1: total = L_0 + lambda / D * sum of w_k L_k."""
    model = get_recipe("mtp_finetune").finalize(world_size=1).model
    factor = LossFactor.parse(model.mtp_loss_scaling_factor).at(0)
    shares = [factor / model.mtp_num_layers * weight for weight in model.mtp_depth_weights]
    assert shares == pytest.approx([0.51, 0.31, 0.18], abs=0.005)
    assert sum(shares) == pytest.approx(1.0)
    assert model.mtp_freeze_trunk
    assert model.mtp_use_repeated_layer


def test_any_model():
    cfg = finetune_drafter(get_recipe("tiny_mla_moe"), num_steps=2, decay=0.5).finalize(world_size=1)
    assert cfg.model.mtp_num_layers == 2
    assert cfg.model.mtp_depth_weights == pytest.approx([4 / 3, 2 / 3])
    assert cfg.model.multi_latent_attention
