"""All experts in one forward pass give what Megatron-Core's experts give one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.dist

NUM_EXPERTS = 5
WAYS = {False: ("megatron", "together", "grouped"), True: ("plain", "together", "grouped")}
COUNTS = {
    "unequal": [7, 0, 3, 1, 5],
    "one expert takes all": [0, 0, 16, 0, 0],
    "no token": [0, 0, 0, 0, 0],
    "equal": [4, 4, 4, 4, 4],
}


def results(fields: dict[str, object], dtype: torch.dtype) -> dict[tuple[str, str], dict[str, Tensor]]:
    """On a rank: output and gradients of input, routing weights and weights, by way of computing and counts."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel
    from megatron_mtp.model.torch_backend.experts import TorchExperts
    from tests.model.torch_backend.tiny import moe_config

    groups = init_model_parallel(tp=1, pp=1, vp=None, cp=1, ep=1, etp=1, embedding_stages=[0])
    try:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        submodules = LocalSpecProvider().grouped_mlp_modules(False).keywords["submodules"]
        config = moe_config(num_moe_experts=NUM_EXPERTS, **fields)
        found = {}
        waited = []
        for way in WAYS[bool(config.add_bias_linear)]:
            experts = TorchExperts(NUM_EXPERTS, config, submodules, groups, is_grouped=way == "grouped").to(dtype)
            generator = torch.Generator().manual_seed(3)
            for parameter in experts.parameters():
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            call = {"megatron": SequentialMLP.forward, "plain": _plain}.get(way, TorchExperts.forward)
            for expert in experts.local_experts:
                for layer in (expert.linear_fc1, expert.linear_fc2):
                    layer.register_forward_pre_hook(lambda module, _: waited.append(module))
            for name, counts in COUNTS.items():
                waited.clear()
                found[way, name] = _gradients(experts, call, counts, dtype)
                # DDP waits for gathered weights in such a hook (ddp.overlap_param_gather).
                assert way == "plain" or len(waited) == 2 * NUM_EXPERTS
        return found
    finally:
        destroy_model_parallel()


def _plain(experts, x, counts, probs):
    """By the definition, for SwiGLU with biases; Megatron-Core's own fails without expert parallelism."""
    results = []
    for expert, rows, weights in zip(
        experts.local_experts, x.split(counts.tolist()), probs[:, None].split(counts.tolist()), strict=True
    ):
        first, second = expert.linear_fc1, expert.linear_fc2
        gate, up = (rows @ first.weight.t() + first.bias).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        results.append(((inner @ second.weight.t() + second.bias) * weights).to(x.dtype))
    return torch.cat(results), None


def _gradients(experts, call, counts, dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(counts), 32, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    upstream = torch.randn(sum(counts), 32, generator=generator).to(dtype)
    output, bias = call(experts, x, torch.tensor(counts), probs)
    assert bias is None
    named = dict(experts.named_parameters())
    wanted = [x, probs, *named.values()]
    gradients = torch.autograd.grad(output, wanted, upstream)
    return {"output": output.detach(), **dict(zip(["x", "probs", *named], gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [{}, {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}, {"add_bias_linear": True}],
    ids=["swiglu", "gelu", "biases"],
)
def test_ways_agree(ranks, fields, dtype):
    (found,) = ranks(1).run(results, fields, dtype)
    for (way, name), got in found.items():
        expected = found["plain" if "add_bias_linear" in fields else "megatron", name]
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            if way == "together" and ("megatron", name) in found:
                assert torch.equal(got[key], tensor), (name, key)
            tolerance = 1e-6 if dtype is torch.float32 else 2e-2
            assert torch.allclose(got[key], tensor, rtol=tolerance, atol=tolerance), (way, name, key)
    unequal = found["together", "unequal"]
    assert unequal["local_experts.0.linear_fc1.weight"].abs().max() > 0
    assert unequal["local_experts.1.linear_fc1.weight"].abs().max() == 0  # it has no token
