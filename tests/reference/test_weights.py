"""The table of names and layouts between the plain model and Megatron-Core, without Megatron-Core."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.reference.plain_model import LatentConfig, MoEConfig, PlainConfig, PlainMTPModel
from tests.reference.weights import gradients_as_megatron, load_from_megatron, weights_as_megatron

pytestmark = pytest.mark.unit

GQA = PlainConfig(
    num_layers=1,
    hidden_size=8,
    num_heads=4,
    num_groups=2,
    head_dim=3,
    vocab_size=10,
    ffn_size=12,
    bias=True,
    num_depths=1,
)
EVERYTHING = replace(
    GQA,
    num_layers=2,
    bias=False,
    num_depths=2,
    latent=LatentConfig(q_lora_rank=6, kv_lora_rank=5, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=3),
    moe=MoEConfig(num_experts=3, topk=2, ffn_size=4, shared_ffn_size=8, shared_gate=True, expert_bias=True),
    moe_layers=(False, True),
)


def test_qkv_rows_alternate_by_group():
    model = PlainMTPModel(GQA)
    attention = model.layers[0].attention
    packed = weights_as_megatron(model)["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (linear.weight.unflatten(0, (-1, 3)) for linear in (attention.q, attention.k, attention.v))
    rows = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
    torch.testing.assert_close(packed, torch.cat(rows), rtol=0, atol=0)


def test_gate_comes_before_up():
    model = PlainMTPModel(GQA)
    packed = weights_as_megatron(model)["decoder.layers.0.mlp.linear_fc1.bias"]
    assert packed.tolist() == [*model.layers[0].mlp.gate.bias.tolist(), *model.layers[0].mlp.up.bias.tolist()]


@pytest.mark.parametrize("cfg", [GQA, EVERYTHING, replace(GQA, tied=True, mtp_variant="parallel")])
def test_loading_what_was_written_gives_the_same_model(cfg):
    one, other = PlainMTPModel(cfg, seed=1).double(), PlainMTPModel(cfg, seed=2).double()
    load_from_megatron(other, weights_as_megatron(one) | {"output_layer._extra_state": None})
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_gradients_are_laid_out_as_weights():
    model = PlainMTPModel(EVERYTHING).double()
    model(torch.arange(12).reshape(2, 6) % 10).total.backward()
    gradients, weights = gradients_as_megatron(model), weights_as_megatron(model)
    assert set(weights) - set(gradients) == {n for n in weights if n.endswith("expert_bias")}
    # Moving each weight along its gradient must change the total by the squared norm: layouts agree element by element.
    step = 1e-7
    moved = {name: w + step * gradients.get(name, 0) for name, w in weights.items()}
    before = model(torch.arange(12).reshape(2, 6) % 10).total.item()
    load_from_megatron(model, moved)
    after = model(torch.arange(12).reshape(2, 6) % 10).total.item()
    assert (after - before) / step == pytest.approx(sum((g**2).sum().item() for g in gradients.values()), rel=1e-4)


def test_frozen_tensors_have_no_gradient_and_unreached_ones_zero():
    model = PlainMTPModel(replace(GQA, mtp_freeze_trunk=True, mtp_lambda=0.0))
    model(torch.arange(12).reshape(2, 6) % 10).total.backward()
    gradients = gradients_as_megatron(model)
    assert all(name.startswith("mtp.") for name in gradients)
    assert all((g == 0).all() for g in gradients.values())


def test_every_difference_in_names_and_shapes_is_named():
    model = PlainMTPModel(GQA)
    weights = weights_as_megatron(model)
    del weights["mtp.layers.0.enorm.weight"]
    weights["decoder.layers.7.mlp.linear_fc1.weight"] = torch.zeros(1)
    weights["output_layer.weight"] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"not in the plain model: decoder\.layers\.7") as error:
        load_from_megatron(model, weights)
    assert "not in the state dict: mtp.layers.0.enorm.weight" in str(error.value)
    assert "output_layer.weight: (3, 8), the plain model has (10, 8)" in str(error.value)
