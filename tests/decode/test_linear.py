"""Every form of a product equals x W^T + bias, and drafting costs no exactness where oneDNN packs."""

from __future__ import annotations

import pytest
import torch

from megatron_mtp.decode import linear as forms

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (1000, 700)], ids=["small", "packed"])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@torch.inference_mode()
def test_products(shape, rows, has_bias):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(shape, generator=generator), torch.randn(rows, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    residual = torch.randn(rows, shape[0], generator=generator)
    product = forms.linear(weight, bias)
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x).double(), wanted, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(product.plus(x, residual).double(), wanted + residual, rtol=1e-5, atol=2e-4)


def test_forms():
    assert isinstance(forms.linear(torch.zeros(8, 8)), forms._Small)
    assert isinstance(forms.linear(torch.zeros(8, 8, dtype=torch.bfloat16)), forms._Plain)
    big = forms.linear(torch.zeros(1024, 1024))
    assert isinstance(big, forms._Packed if forms.packs() else forms._Small)
