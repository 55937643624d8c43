"""Norms against their formulas in fp64, and their marks for sequence parallelism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_mtp.device import cpu_facade
from megatron_mtp.model.torch_backend.norm import TorchNorm
from tests.model.torch_backend.tiny import dense_config

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def facade():
    cpu_facade.install("cpu")
    yield
    cpu_facade.uninstall()


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norm_and_input(dtype: torch.dtype, **config) -> tuple[TorchNorm, Tensor, Tensor]:
    torch.manual_seed(0)
    norm = TorchNorm(dense_config(params_dtype=dtype, **config), 24, eps=1e-3)
    for param in norm.parameters():
        param.data.add_(0.1 * torch.randn(24).to(dtype))
    x = (torch.randn(3, 2, 24) * torch.tensor([1e-2, 1.0, 1e3])[:, None, None] + 0.5).to(dtype)
    return norm, x, torch.randn(3, 2, 24).to(dtype)


def results(norm: TorchNorm, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad(out, [x, *norm.parameters()], grad)]


def expected(norm: TorchNorm, x: Tensor, grad: Tensor) -> list[Tensor]:
    inputs = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    bias = inputs[2] if len(inputs) == 3 else None
    out = formula(inputs[0], inputs[1], bias, norm.eps, norm.zero_centered)
    return [out, *torch.autograd.grad(out, inputs, grad.double())]


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
def test_matches_the_formula(dtype, tolerance, normalization, zero_centered):
    case = norm_and_input(dtype, normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    for got, want in zip(results(*case), expected(*case), strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).norm() / want.norm()) < tolerance


def test_statistics_of_bf16_are_taken_in_fp32():
    norm, _, _ = norm_and_input(torch.bfloat16)
    norm.weight.data.fill_(1.0)
    x = torch.full((1, 24), 3.0, dtype=torch.bfloat16)
    x[0, 0] = 60.0  # 60^2 + 23 * 9: in bf16 each 9 would vanish next to 3600
    want = formula(x.double(), norm.weight.double(), None, norm.eps, False)
    assert torch.equal(norm(x), want.to(torch.bfloat16))


def test_zero_centred_weights_keep_their_small_difference():
    norm = TorchNorm(dense_config(params_dtype=torch.bfloat16, layernorm_zero_centered_gamma=True), 8)
    norm.weight.data.fill_(0.003)  # 1.003 is not a bf16 number
    x = torch.full((1, 8), 250.0, dtype=torch.bfloat16)
    assert torch.equal(norm(x), torch.full((1, 8), 1.003).to(torch.bfloat16))
    x = torch.linspace(-2, 2, 8).to(torch.bfloat16)[None]
    want = formula(x.double(), norm.weight.double(), None, norm.eps, True).to(torch.bfloat16)
    assert torch.equal(norm(x), want)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_for_sequence_parallelism(sequence_parallel):
    config = dense_config(normalization="LayerNorm", sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    marks = [param.sequence_parallel for param in TorchNorm(config, 8).parameters()]
    assert marks == [sequence_parallel] * 2


def test_fresh_parameters_are_the_identity():
    for zero_centered in (False, True):
        norm = TorchNorm(dense_config(normalization="LayerNorm", layernorm_zero_centered_gamma=zero_centered), 8)
        assert norm.weight.tolist() == [0.0 if zero_centered else 1.0] * 8
        assert norm.bias.tolist() == [0.0] * 8
