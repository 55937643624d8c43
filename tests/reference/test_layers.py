"""Norms, activations, RoPE and attention of the plain model against torch's own and against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.reference.plain_layers import Norm, activate, attend, rotate
from tests.reference.plain_model import PlainConfig

pytestmark = pytest.mark.unit

CFG = PlainConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=4, rope_base=100.0)
X = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])


@pytest.mark.parametrize(
    ("name", "function"),
    [("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu), ("squared_relu", lambda x: F.relu(x) ** 2)],
)
def test_activations(name, function):
    torch.testing.assert_close(activate(X, name), function(X), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(kind, zero_centered):
    norm = Norm(replace(CFG, normalization=kind, zero_centered_gamma=zero_centered), 8).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    gain = norm.weight + 1 if zero_centered else norm.weight
    bias = [norm.bias] if kind == "LayerNorm" else []
    function = F.layer_norm if kind == "LayerNorm" else F.rms_norm
    torch.testing.assert_close(norm(X), function(X, (8,), gain, *bias, eps=CFG.eps), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rope_turns_pair_j_by_its_own_angle(percent, pairs):
    width = int(8 * percent)
    turned = rotate(X, POSITIONS, replace(CFG, rope_percent=percent), pairs)
    for b in range(2):
        for i in range(5):
            for j in range(width // 2):
                first, second = (j, j + width // 2) if pairs == "halves" else (2 * j, 2 * j + 1)
                angle = POSITIONS[b, i].item() * 100.0 ** (-2 * j / width)
                x, y = X[b, i, 0, first].item(), X[b, i, 0, second].item()
                assert turned[b, i, 0, j].item() == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-13)
                got = turned[b, i, 0, j + width // 2].item()
                assert got == pytest.approx(y * math.cos(angle) + x * math.sin(angle), abs=1e-13)
    assert torch.equal(turned[..., width:], X[..., width:])


def test_no_positions_means_no_rotation():
    assert rotate(X, POSITIONS, replace(CFG, rope_base=None), "halves") is X


def test_attention_equals_scaled_dot_product_attention():
    allowed = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    allowed[1, 3:, :2] = False
    heads_first = [t.transpose(1, 2) for t in (X, X.flip(0), X[..., :6].flip(1))]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=allowed[:, None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(X, X.flip(0), X[..., :6].flip(1), allowed), expected, rtol=1e-13, atol=1e-14)
